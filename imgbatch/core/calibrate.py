"""A better calibrated bundle from stored predictions: temperature, and thresholds for accept or review.

Temperature scaling does not change which class of a softmax is the most probable one; it changes how sure it is said
to be. Nor does it change which of several labels apply: their thresholds are taken to the new temperature. See
:mod:`imgbatch.core.metrics.temperature` for why stored probabilities suffice. Legend of the shape suffixes: ``N`` rows,
``K`` classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from imgbatch.core.metrics import probability
from imgbatch.core.metrics import temperature as scaling
from imgbatch.core.metrics import thresholds as choosing
from imgbatch.core.metrics.calibration import ReliabilityBins
from imgbatch.core.metrics.intervals import CONFIDENCE
from imgbatch.core.model import ModelBundle, load_bundle, load_metrics, recalibrate_bundle
from imgbatch.core.plain import to_plain
from imgbatch.core.rank_sample import RankSample
from imgbatch.core.scored import Scored, open_scored
from imgbatch.core.variants import load_variants, read_files, save_variant
from imgbatch.errors import UsageError

_SEED = 0


@dataclass(frozen=True, slots=True)
class Calibration:
    """The new bundle, and what was fitted and chosen."""

    bundle: ModelBundle
    report: dict[str, Any]
    """As the bundle's metrics.json holds it under ``calibration``."""


def calibrate(
    out: str,
    *,
    model: str,
    new_model: str,
    manifest: str | None = None,
    split: str | None = None,
    target_precision: float | None = None,
    review_budget: float | None = None,
) -> Calibration:
    """Write ``model`` to ``new_model`` with a temperature and thresholds that fit the predictions of ``out``.

    Without either goal only the temperature is fitted. Multi-label: the probabilities from which labels apply become
    those of the new temperature, so that the same labels do; ``target_precision`` chooses them anew. Thresholds for
    review are left out unless a goal chooses them. Variants come along.

    Args:
        model: the bundle that made the predictions.
        manifest: where the targets are; none: the classified manifest's own.
        split: only rows of this split.
        target_precision: accept a class's labels from the lowest probability at which so many are right at 80%
            confidence, 0 to 1, so that new images mostly keep it; a class with too few rows to show it is always
            reviewed. Multi-label: also the probability from which each label applies.
        review_budget: share of the rows that may be reviewed, 0 to 1.

    Raises:
        UsageError: both goals, another model's predictions, or no rows to fit.
    """
    if target_precision is not None and review_budget is not None:
        raise UsageError("--target-precision and --review-budget: give one of them")
    bundle = load_bundle(model)
    with open_scored(out, manifest=manifest, split=split) as scored:
        if scored.labeller.model_ids != (bundle.model_id,):
            made_by = ", ".join(scored.labeller.model_ids)
            raise UsageError(f"-m {model}: its model_id is {bundle.model_id}, but {out} was labelled by {made_by}")
        num_rows, num_of_train = scored.fetch_row(
            "select count(*), count(*) filter (of_train) from scored where is_known"
        )
        if not num_rows:
            raise UsageError(f"{out}: no row has both a prediction and a target that the model knows")
        sample, factor_K, report = _fit(scored, num_rows)
        moved = _moved_labels(bundle, factor_K)
        thresholds = dict(moved)
        if target_precision is not None or review_budget is not None:
            thresholds["accept"], report["accept"] = _choose_accept(scored, factor_K, target_precision, review_budget)
        if scored.labeller.is_multilabel and target_precision is not None and sample is not None:
            thresholds["labels"] = _choose_labels(scored, sample, factor_K, target_precision)
    variants = load_variants(bundle)
    if variants:
        report["variants"] = {"copied": [variant.target for variant in variants], "note": None}
        if thresholds.get("labels") != moved.get("labels"):
            report["variants"]["note"] = (
                f"how well they agree was measured with the label thresholds of {bundle.model_id}; "
                f"`imgbatch model optimize` measures it anew"
            )
    report |= {
        "target_precision": target_precision,
        "confidence": CONFIDENCE if target_precision is not None else None,
        "review_budget": review_budget,
        "calibrated_model": bundle.model_id,
        "run_ids": scored.labeller.run_ids,
        "targets": manifest or "the classified manifest",
        "split": split,
        "of_train_split": num_of_train,
    }
    report = to_plain(report)
    decided = ("calibrated_model", "run_ids", "targets", "split", "target_precision", "review_budget")
    calibrated = recalibrate_bundle(
        bundle,
        new_model,
        temperature=_combined(bundle.temperature, factor_K),
        thresholds=thresholds or None,
        provenance=bundle.provenance | {"calibration": {name: report[name] for name in decided}},
        metrics=load_metrics(bundle.path) | {"calibration": report},
    )
    for variant in variants:
        save_variant(calibrated, variant, read_files(bundle, variant))
    return Calibration(calibrated, report)


def _combined(old: float | tuple[float, ...], factor_K: np.ndarray) -> float | tuple[float, ...]:
    """The temperature of the logits: stored probabilities were already at ``old``."""
    product_K = np.asarray(old) * factor_K
    return float(product_K) if product_K.ndim == 0 else tuple(product_K.tolist())


def _moved_labels(bundle: ModelBundle, factor_K: np.ndarray) -> dict[str, dict[str, float]]:
    """``{"labels": ...}`` of the bundle, if it has them, for probabilities whose logits are divided by ``factor_K``."""
    stated = (bundle.thresholds or {}).get("labels")
    if stated is None or bundle.task != "multilabel":
        return {}
    factors = dict(zip(bundle.class_names, np.broadcast_to(factor_K, bundle.num_classes).tolist(), strict=True))
    return {"labels": {name: scaling.scale_threshold(limit, factors[name]) for name, limit in stated.items()}}


def _fit(scored: Scored, num_rows: int) -> tuple[RankSample | None, np.ndarray, dict[str, Any]]:
    """The sample fitted on, the factor to the temperature (a number, or one per label), and what it changes."""
    labeller = scored.labeller
    if not labeller.has_probabilities:
        reason = "the run stored only the best classes (output.probabilities), so the temperature stays as it was"
        return None, np.array(1.0), {"temperature_factor": None, "unavailable": {"temperature_factor": reason}}
    sample = RankSample(num_rows, labeller.num_classes, seed=_SEED)
    truth = "truth" if labeller.is_multilabel else "target_index"
    columns = [truth, "probabilities", f"hash(image_id, {_SEED}) as lot"]
    for batch in scored.iter_batches(columns, "is_known"):
        probs_NK, lots_N = scored.probabilities(batch["probabilities"]), batch["lot"].to_numpy()
        if labeller.is_multilabel:
            sample.add(lots_N, probs_NK, scored.membership(batch[truth]))
        else:
            sample.add_single_label(lots_N, probs_NK, batch[truth].to_numpy())
    probs_NK, truth_NK = sample.rows()
    if labeller.is_multilabel:
        factor_K = scaling.fit_sigmoid_temperatures(probs_NK, truth_NK)
    else:
        factor_K = np.array(scaling.fit_softmax_temperature(probs_NK, truth_NK))
    scaled_NK = _scaled(scored, probs_NK, factor_K)
    report = {
        "temperature_factor": factor_K,
        "rows": {"fitted": len(probs_NK), "of": num_rows},
        "before": _measure(scored, probs_NK, truth_NK),
        "after": _measure(scored, scaled_NK, truth_NK),
    }
    return sample, factor_K, report


def _scaled(scored: Scored, probs_NK: np.ndarray, factor_K: np.ndarray) -> np.ndarray:
    if scored.labeller.is_multilabel:
        return scaling.scale_sigmoid(probs_NK, factor_K)
    return scaling.scale_softmax(probs_NK, float(factor_K))


def _measure(scored: Scored, probs_NK: np.ndarray, truth_NK: np.ndarray) -> dict[str, float]:
    bins = ReliabilityBins()
    if scored.labeller.is_multilabel:
        bins.add(probs_NK.ravel(), truth_NK.ravel())
        loss = float(probability.binary_log_loss_sum(probs_NK, truth_NK).sum() / truth_NK.size)
    else:
        targets_N, best_N = truth_NK.argmax(axis=1), probs_NK.argmax(axis=1)
        bins.add(probs_NK.max(axis=1), best_N == targets_N)
        loss = probability.log_loss_sum(probs_NK, targets_N) / len(probs_NK)
    return {"log_loss": loss, "expected_calibration_error": bins.expected_calibration_error()}


def _choose_accept(
    scored: Scored, factor_K: np.ndarray, target_precision: float | None, review_budget: float | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """``{class name: probability}`` and what it does per class; a class without an entry is always reviewed."""
    parts = list(_iter_answers(scored, factor_K))
    label_N, confidence_N, right_N = (np.concatenate(part) for part in zip(*parts, strict=True))
    budgeted = None if review_budget is None else choosing.for_review_budget(confidence_N, review_budget)
    accept: dict[str, float] = {}
    per_class = []
    for k, class_name in enumerate(scored.labeller.class_names):
        confidence, right = confidence_N[label_N == k], right_N[label_N == k]
        threshold = budgeted
        if target_precision is not None:
            threshold = choosing.for_precision(confidence, right, target_precision)
        if threshold is not None:
            accept[class_name] = threshold
        found = choosing.describe_acceptance(confidence, right, threshold)
        per_class.append({"class_name": class_name, **asdict(found)})
    num_accepted, num_right = (sum(entry[name] for entry in per_class) for name in ("accepted", "right"))
    return accept, {
        "rows": len(label_N),
        "accepted": num_accepted,
        "review_rate": 1 - num_accepted / len(label_N),
        "precision": num_right / num_accepted if num_accepted else None,
        "per_class": per_class,
    }


def _iter_answers(scored: Scored, factor_K: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Label int32, its probability float32 at the new temperature, and whether it is right: 9 bytes a row.

    Over all rows with a target: one that the model does not know makes any label wrong, as it would in use.
    """
    labeller = scored.labeller
    if not labeller.has_probabilities:
        right = "list_contains(truth, label)" if labeller.is_multilabel else "is_right"
        for batch in scored.iter_batches(["label_index", "probability", f"{right} as correct"]):
            yield (
                batch["label_index"].to_numpy().copy(),
                batch["probability"].to_numpy().copy(),
                batch["correct"].to_numpy(zero_copy_only=False),
            )
        return
    truth = "truth" if labeller.is_multilabel else "coalesce(target_index, -1) as target_index"
    for batch in scored.iter_batches(["probabilities", truth]):
        scaled_NK = _scaled(scored, scored.probabilities(batch["probabilities"]), factor_K)
        label_N = scaled_NK.argmax(axis=1).astype(np.int32)
        if labeller.is_multilabel:
            right_N = scored.membership(batch["truth"])[np.arange(len(label_N)), label_N]
        else:
            right_N = batch["target_index"].to_numpy() == label_N
        yield label_N, scaled_NK.max(axis=1), right_N


def _choose_labels(
    scored: Scored, sample: RankSample, factor_K: np.ndarray, target_precision: float
) -> dict[str, float]:
    """From which probability each label applies, from the sample; 1, practically never, if it is never that precise."""
    probs_NK, truth_NK = sample.rows()
    scaled_NK = _scaled(scored, probs_NK, factor_K)
    chosen = [choosing.for_precision(scaled_NK[:, k], truth_NK[:, k], target_precision) for k in range(len(factor_K))]
    return {
        name: 1.0 if threshold is None else threshold
        for name, threshold in zip(scored.labeller.class_names, chosen, strict=True)
    }
