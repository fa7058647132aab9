"""Methods made for low-rank adapters (LoRA), of PEFT models."""

from hf_sharp._adapters.bar import BAR as BAR
from hf_sharp._adapters.bi_lora import BiLoRA as BiLoRA
from hf_sharp._adapters.flat_lora import FlatLoRA as FlatLoRA
