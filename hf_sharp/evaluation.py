"""Measurements of causal language models, as unlearning is judged by them: memory, membership, utility."""

from hf_sharp.unlearning._evaluation import TokenScores as TokenScores
from hf_sharp.unlearning._evaluation import auc as auc
from hf_sharp.unlearning._evaluation import extraction_strength as extraction_strength
from hf_sharp.unlearning._evaluation import forget_quality as forget_quality
from hf_sharp.unlearning._evaluation import generate as generate
from hf_sharp.unlearning._evaluation import min_k as min_k
from hf_sharp.unlearning._evaluation import model_utility as model_utility
from hf_sharp.unlearning._evaluation import option_probability as option_probability
from hf_sharp.unlearning._evaluation import perplexity as perplexity
from hf_sharp.unlearning._evaluation import privleak as privleak
from hf_sharp.unlearning._evaluation import probability as probability
from hf_sharp.unlearning._evaluation import rouge_l as rouge_l
from hf_sharp.unlearning._evaluation import rouge_l_recall as rouge_l_recall
from hf_sharp.unlearning._evaluation import score as score
from hf_sharp.unlearning._evaluation import summary as summary
from hf_sharp.unlearning._evaluation import tofu_metrics as tofu_metrics
from hf_sharp.unlearning._evaluation import token_accuracy as token_accuracy
from hf_sharp.unlearning._evaluation import truth_ratio as truth_ratio
from hf_sharp.unlearning._evaluation import truth_ratio_score as truth_ratio_score
from hf_sharp.unlearning._evaluation import verbatim_memory as verbatim_memory
