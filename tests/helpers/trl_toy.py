"""TRL's trainers on tiny data of every kind, plain or sharp: what is trained by test_trl.py and on two ranks."""

import copy

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from hf_sharp import make_sharp
from models import seeded, tiny_llama

WORDS = ["<pad>", "<s>", "</s>", "user", "assistant", ":", "\n", *(f"w{i}" for i in range(25))]
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ' : ' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + ' </s>' }}{% endgeneration %}{% else %}{{ m.content + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}


def tokenizer():
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **names)


def words(draw, least=2, most=9):
    count = int(torch.randint(least, most, (), generator=draw))
    return " ".join(WORDS[7 + int(i)] for i in torch.randint(25, (count,), generator=draw))


def texts(kind, count=48):
    """Rows of one of TRL's kinds of data, of unequal lengths."""
    draw = torch.Generator().manual_seed(3)
    said = [[words(draw) for _ in range(3)] for _ in range(count)]
    make = {
        "text": lambda a, b, c: {"text": f"{a} {b}"},
        "completion": lambda a, b, c: {"prompt": a, "completion": " " + b},
        "chat": lambda a, b, c: {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]},
        "preference": lambda a, b, c: {"prompt": a, "chosen": " " + b, "rejected": " " + c},
        "whole": lambda a, b, c: {"chosen": f"{a} {b}", "rejected": f"{a} {c}"},
        "unpaired": lambda a, b, c: {"prompt": a, "completion": " " + b, "label": len(b) > len(c)},
    }[kind]
    return Dataset.from_list([make(*row) for row in said])


def reward_model():
    size = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64}
    with seeded(0):
        return LlamaForSequenceClassification(LlamaConfig(**size, num_labels=1, pad_token_id=0))


def llama(dropout=0.1, **settings):
    return tiny_llama(dropout=dropout, max_position_embeddings=64, **settings)


CASES = {  # trainer, kind of data, settings of the config, further arguments
    "SFT": ("SFTTrainer", "text", {}, {}),
    "SFT, completions only": ("SFTTrainer", "completion", {"completion_only_loss": True}, {}),
    "SFT, assistant only": ("SFTTrainer", "chat", {"assistant_only_loss": True}, {}),
    "SFT, packed": ("SFTTrainer", "text", {"packing": True, "max_length": 24}, {}),
    "SFT, packed by cutting": (
        "SFTTrainer",
        "text",
        {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
        {},
    ),
    "SFT, adapters": ("SFTTrainer", "text", {}, {"peft_config": LORA}),
    "SFT, adapters, no checkpointing": (
        "SFTTrainer",
        "text",
        {"activation_checkpointing": False},
        {"peft_config": LORA | {"lora_dropout": 0.2}},
    ),
    "SFT, dft": ("SFTTrainer", "text", {"loss_type": "dft"}, {}),
    "SFT, bf16": ("SFTTrainer", "text", {"bf16": True}, {}),
    "DPO": ("DPOTrainer", "preference", {}, {"ref_model": True}),
    "DPO, several losses": (
        "DPOTrainer",
        "preference",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"ref_model": True},
    ),
    "DPO, reference before": ("DPOTrainer", "preference", {"precompute_ref_log_probs": True}, {"ref_model": True}),
    "DPO, adapters": ("DPOTrainer", "preference", {}, {"peft_config": LORA}),
    "Reward": ("RewardTrainer", "whole", {"center_rewards_coefficient": 0.01}, {}),
    "KTO": ("KTOTrainer", "unpaired", {}, {"ref_model": True}),
}


def build(case, folder, sharp=False, model=None, **settings):
    """One of TRL's trainers on tiny data, plain or sharp."""
    import trl  # an extra: whoever runs this has it

    name, kind, options, further = CASES[case]
    method = {key: settings.pop(key) for key in ("method", "callbacks") if key in settings}
    base = {"max_steps": 3, "logging_steps": 1, "learning_rate": 0.05, "per_device_train_batch_size": 4}
    base |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    base |= {"activation_checkpointing": True}  # TRL's default, by the name that is not deprecated
    args = getattr(trl, name.replace("Trainer", "Config"))(str(folder), **(base | options | settings))
    model = model if model is not None else reward_model() if name == "RewardTrainer" else llama()
    given = dict(further)
    if "ref_model" in given:
        given["ref_model"] = copy.deepcopy(model)
    if "peft_config" in given:
        given["peft_config"] = LoraConfig(task_type="CAUSAL_LM", **given["peft_config"])
    cls = getattr(trl, name)
    cls = make_sharp(cls) if sharp else cls
    return cls(model=model, args=args, train_dataset=texts(kind), processing_class=tokenizer(), **given, **method)


def run(case, folder, **settings):
    trainer = build(case, folder, **settings)
    trainer.train()
    return trainer


def sgd(trainer_steps=3, **settings):
    """Settings under which a step is w - 0.05 g, on rows in their order."""
    plain = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": trainer_steps}
    return plain | {"train_sampling_strategy": "sequential", **settings}
