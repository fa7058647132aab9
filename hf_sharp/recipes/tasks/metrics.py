"""The official GLUE metrics as ``evaluate.Metric`` classes over scikit-learn and scipy, so that nothing is downloaded.

``evaluate.load("glue", ...)`` fetches and runs a script; these are the same numbers from code that is read here.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hf_sharp._extras import optional

evaluate = optional("evaluate")


class GlueMetric(evaluate.Metric):
    """What the metrics of GLUE share: two columns of numbers, kept in memory. Abstract: use one of the others."""

    kind = "int64"

    def _info(self) -> Any:
        value = optional("datasets").Value(self.kind)
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="Wang et al., 2018, GLUE: A Multi-Task Benchmark and Analysis Platform",
            inputs_description="predictions and references, one number each",
            features=optional("datasets").Features({"predictions": value, "references": value}),
        )


class Accuracy(GlueMetric):
    """Share of right answers: RTE, SST-2, QNLI, MNLI, WNLI."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(optional("sklearn.metrics").accuracy_score(references, predictions))}


class AccuracyAndF1(GlueMetric):
    """Share of right answers, and F1 of class 1: MRPC, QQP."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        metrics = optional("sklearn.metrics")
        return {
            "accuracy": float(metrics.accuracy_score(references, predictions)),
            "f1": float(metrics.f1_score(references, predictions, zero_division=0.0)),
        }


class Matthews(GlueMetric):
    """Matthews correlation: CoLA. A constant prediction has 0."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        value = optional("sklearn.metrics").matthews_corrcoef(references, predictions)
        return {"matthews_correlation": float(value)}


class Correlation(GlueMetric):
    """Pearson's and Spearman's correlation and their mean: STS-B.

    A constant prediction, which correlates with nothing, counts as 0 instead of not-a-number.
    """

    kind = "float64"

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        stats = optional("scipy.stats")
        if len(set(predictions)) == 1 or len(set(references)) == 1:
            pearson = spearman = 0.0
        else:
            pearson = float(stats.pearsonr(predictions, references)[0])
            spearman = float(stats.spearmanr(predictions, references)[0])
        return {"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2}


METRICS: dict[str, type[GlueMetric]] = {
    "accuracy": Accuracy,
    "accuracy_and_f1": AccuracyAndF1,
    "matthews": Matthews,
    "correlation": Correlation,
}


def load_metric(name: str) -> GlueMetric:
    """Make a metric.

    Args:
        name: one of ``METRICS``, as in ``GLUE[task].metric``.

    Returns:
        The metric; its ``compute(predictions=..., references=...)`` gives a dict of floats.

    Raises:
        ValueError: if there is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"Unknown metric {name!r}. Known: {', '.join(METRICS)}.")
    return METRICS[name](keep_in_memory=True)


def majority_value(name: str, main: str, references: Sequence[int | float]) -> float | None:
    """What a model gets that has learnt nothing: it always answers with the most frequent class of the evaluation.

    Args:
        name: one of ``METRICS``.
        main: which of its numbers.
        references: the true labels.

    Returns:
        That number, or None for a task without classes.
    """
    if name == "correlation":
        return None
    most = Counter(references).most_common(1)[0][0]
    return load_metric(name).compute(predictions=[most] * len(references), references=references)[main]
