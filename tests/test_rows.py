"""Rows of a micro-batch where they are not simply the first dimension of everything."""

import pytest
import torch

from hf_sharp import SharpTrainer, fsam, sam
from hf_sharp._engine import rows
from models import mlp_rows, tiny_mlp
from training import train


def batch_of_images(patches):
    """Four rows of text, and the patches of their images in one tensor, as Qwen2-VL's processor gives them."""
    return {"input_ids": torch.zeros(4, 8), "labels": torch.zeros(4), "pixel_values": torch.zeros(patches, 6)}


@pytest.mark.parametrize("patches", [16, 7, 2])
def test_patches_of_all_images_in_one_tensor_are_refused_by_name(patches):
    assert rows.count(batch_of_images(patches)) == 4
    for part in (slice(2), slice(1, 2)):
        with pytest.raises(ValueError, match=rf"there are 4, but pixel_values has the shape \({patches}, 6\)"):
            rows.part(batch_of_images(patches), part)


def test_all_rows_are_the_batch_itself_whatever_is_in_it():
    flattened = {"input_ids": torch.zeros(1, 40), "position_ids": torch.zeros(1, 40), "cu_seq_lens_q": torch.zeros(6)}
    assert rows.count(flattened) == 1 and rows.part(flattened, slice(0, 1)) is flattened
    images = batch_of_images(16)
    assert rows.part(images, slice(4)) is images


def test_lists_with_an_entry_a_row_are_cut_with_the_rows():
    """The boxes of each image, one a picture in most: their number is no number of rows."""
    boxes = [{"class_labels": torch.zeros(n), "boxes": torch.zeros(n, 4)} for n in (1, 1, 4, 1)]
    masks = [torch.zeros(n, 5, 5) for n in (1, 1, 2, 3)]
    batch = {
        "pixel_values": torch.zeros(4, 3, 5, 5),
        "labels": boxes,
        "mask_labels": masks,
        "texts": [["a"], [], ["b"], []],
    }
    assert rows.count(batch) == 4
    half = rows.part(batch, slice(1, 3))
    assert half["pixel_values"].shape[0] == 2 and half["labels"] == boxes[1:3]
    assert [mask.shape[0] for mask in half["mask_labels"]] == [1, 2] and half["texts"] == [[], ["b"]]


def test_lists_of_columns_are_cut_entry_by_entry():
    """A cache of two layers for three rows; a list as long as the batch is one too if its tensors have its rows."""
    for layers in (2, 3):
        batch = {"x": torch.zeros(3, 2), "cache": tuple((torch.zeros(3, 4), torch.zeros(3, 4)) for _ in range(layers))}
        cut = rows.part(batch, slice(1))["cache"]
        assert len(cut) == layers and all(t.shape == (1, 4) for layer in cut for t in layer)


def test_a_share_that_is_all_of_the_batch_is_said_and_counted(recwarn):
    assert rows.share({"x": torch.zeros(8, 2)}, 0.5) == (4, 8)
    assert rows.share({"x": torch.zeros(8, 2)}, 0.01) == (1, 8) and not recwarn.list
    rows._say_that_all_is_taken.cache_clear()
    for _ in range(2):
        assert rows.share({"input_ids": torch.zeros(1, 40)}, 0.5) == (1, 1)
    assert [str(w.message)[:60] for w in recwarn.list] == [
        "fraction=0.5 of a micro-batch of 1 row is all of it (texts l"
    ]
    assert "costs 2 passes and not 1.5" in str(recwarn.list[0].message)


class Vision(torch.nn.Module):
    """Takes the mean of four patches a row into account, all patches lying in one tensor."""

    def __init__(self):
        super().__init__()
        self.text = tiny_mlp()

    def forward(self, x, patches, labels=None):
        return self.text(x + (patches.view(len(x), 4, -1).mean((1, 2)) > 10).long()[:, None], labels)


@pytest.mark.parametrize(
    "method", [sam(0.05, fraction=0.5), fsam(0.05, every=1, fisher="per_sample")], ids=["fraction", "per_sample"]
)
def test_a_run_over_flattened_patches_says_what_it_needs_and_whole_micro_batches_go(method, tmp_path):
    def collate(features):
        columns = {key: torch.stack([row[key] for row in features]) for key in features[0]}
        return columns | {"patches": torch.zeros(4 * len(features), 6)}

    settings = {"method": method, "data_collator": collate, "remove_unused_columns": False, "max_steps": 1}
    with pytest.raises(ValueError, match=r"patches has the shape \(16, 6\).*gradient_accumulation_steps"):
        train(SharpTrainer, Vision(), mlp_rows(16), tmp_path, **settings)
    if method.cost < 2:
        trainer = train(SharpTrainer, Vision(), mlp_rows(16), tmp_path, gradient_accumulation_steps=2, **settings)
        assert trainer.state.log_history[0]["sharp_evaluations"] == 1.5
