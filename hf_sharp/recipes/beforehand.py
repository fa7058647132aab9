"""What a recipe makes sure of before any training, so that nothing is missing or refused after hours of it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from hf_sharp._engine.rows import SAMPLE_INDEX
from hf_sharp._extras import optional

Model = TypeVar("Model")


def need(*packages: str) -> None:
    """Make sure that optional packages are installed which are used only after training.

    Args:
        packages: names to import. A missing one is an ``ImportError`` with the command that installs it.
    """
    for package in packages:
        optional(package)


def load(make: Callable[[], Model]) -> Model:
    """Load a model, and say what to do if its head has another size than the task.

    Args:
        make: loads it.

    Returns:
        The model.

    Raises:
        ValueError: if the checkpoint's head has another number of classes.
        RuntimeError: for whatever else it raises.
    """
    try:
        return make()
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            "The checkpoint was trained for another number of classes than this task has, so its head does not fit. "
            "Add --ignore_mismatched_sizes to replace it by a new one."
        ) from error


def try_methods(methods: Mapping[str, Any], make: Callable[[], Any], build: Callable[[Any, Any], object]) -> None:
    """Load the model once and build a trainer for every method: one that this model does not allow is refused there.

    Args:
        methods: by label.
        make: loads the model.
        build: from the model and a method to a trainer, which is not used.

    Raises:
        ValueError: of the first method that is refused, beginning with its label, or of a head that does not fit.
    """
    model = load(make)
    for label, method in methods.items():
        try:
            build(model, method)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error


def bare(kind: Callable[..., object], args: Any) -> Callable[[Any, Any], object]:
    """What `try_methods` builds where the data do not matter.

    Args:
        kind: a class of trainers.
        args: its arguments.

    Returns:
        A function of a model and a method.
    """
    return lambda model, method: kind(model, args, method=method, eval_dataset=[])


def number_rows(rows: Any, methods: Iterable[Any]) -> Any:
    """Number the rows of a data set by the column ``sample_index`` if a method knows them again by it.

    Args:
        rows: a ``datasets.Dataset``.
        methods: settings with a ``build``.

    Returns:
        The rows, with that column if it is needed.
    """
    parts = [part for method in methods for _, part in method.build().named_parts()]
    needed = any("index" in part.needs for part in parts) and SAMPLE_INDEX not in rows.column_names
    return rows.add_column(SAMPLE_INDEX, list(range(len(rows)))) if needed else rows
