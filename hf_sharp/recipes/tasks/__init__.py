"""Data that the recipes train on: GLUE with its official metrics, and a text task that every machine already has."""

from hf_sharp.recipes.tasks.docstrings import PACKAGES as PACKAGES
from hf_sharp.recipes.tasks.docstrings import TextTask as TextTask
from hf_sharp.recipes.tasks.docstrings import load_docstrings as load_docstrings
from hf_sharp.recipes.tasks.docstrings import small_bert as small_bert
from hf_sharp.recipes.tasks.docstrings import word_tokenizer as word_tokenizer
from hf_sharp.recipes.tasks.domains import load_domains as load_domains
from hf_sharp.recipes.tasks.glue import GLUE as GLUE
from hf_sharp.recipes.tasks.glue import GlueTask as GlueTask
from hf_sharp.recipes.tasks.glue import load_glue as load_glue
from hf_sharp.recipes.tasks.noise import redraw_labels as redraw_labels
