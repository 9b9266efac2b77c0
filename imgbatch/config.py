"""The whole configuration: small, typed, validated, unknown keys refused.

Flags win over ``--set``, ``--set`` over the file, the file over the defaults here. The resolved configuration is
stored with the run. Where a value is ``auto``, what it became is stored too (``run.json``).
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from imgbatch.errors import UsageError, normalise_message

PositiveInt = Annotated[int, Field(ge=1)]
Auto = Literal["auto"]
IfChanged = Literal["error", "warn", "ignore"]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys forbidden."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class InputConfig(Section):
    """What to label."""

    manifest: str | None = None
    """A Parquet file or a directory of them."""
    limit: PositiveInt | None = None
    """Only the first so many rows."""
    duplicates: Literal["error", "keep"] = "error"
    """What to do when an ``image_id`` stands there more than once."""
    skip_existing: bool = False
    """Leave out the rows that the same model has labelled in this output, and those whose image is broken and, by its
    etag, unchanged."""
    since_run: str | None = None
    """As ``skip_existing``, but only labels and failures of this run and of later ones count."""
    if_changed: IfChanged = "error"
    """What becomes of an object that is not what the manifest's ``etag`` says: a ``CHANGED`` row, or its label all
    the same, with or without a line about how many there were."""


class ModelConfig(Section):
    """What labels it."""

    path: str | None = None
    """A model bundle (a directory)."""


class PreprocessConfig(Section):
    """Overrides of the bundle's own preprocessing; they change results and so the run."""

    resize_size: PositiveInt | None = None
    """Length of the shorter side after resizing, px."""
    crop_size: PositiveInt | None = None
    """Side of the centre crop that the model sees, px."""
    resize_mode: Literal["shorter_side", "stretch"] | None = None
    """``stretch`` resizes both sides to ``resize_size``, so that nothing need be cut away; ``shorter_side`` keeps the
    image's proportions."""
    median_size: Literal[0, 3, 5, 7] | None = None
    """Side of a median filter that takes noise out of the decoded image, px; 0: none."""
    reducing_gap: Annotated[float, Field(ge=0)] | None = None
    """At least 1: large JPEGs are decoded at a half, a quarter or an eighth of their size, as long as that is so many
    times the size after resizing (3 is hard to tell from the whole, 1 is the fastest); 0: never."""


class FetchConfig(Section):
    """Getting the bytes."""

    timeout_s: float = Field(30.0, gt=0)
    """Seconds that one request may take."""
    retries: int = Field(4, ge=0)
    """Further tries after a failure that may pass (timeouts, resets, 408, 429, 500, 502 to 504, 520 to 524). What is
    turned away for the number of requests (429, 503) is tried for a minute, unless this is 0."""
    in_flight: PositiveInt = 32
    """Requests under way at once in each decode actor: at 50 ms each, 32 bring 640 images a second, which is more
    than a core decodes."""
    max_bytes: PositiveInt = 256 * 2**20
    """A larger file is ``TOO_LARGE``."""
    hedge_after_s: float | None = Field(None, gt=0)
    """Seconds without an answer from S3 after which the same is asked once more, and the faster answer taken; a good
    value is what one request in a hundred takes longer than. None: never."""
    client: Literal["auto", "s3fs", "obstore"] = "auto"
    """What gets objects from S3; auto: obstore where it is installed, which takes less CPU."""
    schemes: tuple[Literal["file", "s3", "https"], ...] = ("file", "s3")
    """What URIs may begin with; ``file`` stands for plain paths too. Anything else is ``REFUSED``."""
    roots: tuple[str, ...] = ()
    """Directories that local images must lie in, symbolic links followed; none: any."""
    private_addresses: bool = False
    """Whether https may go to private, loopback and link-local addresses."""


class DecodeConfig(Section):
    """Turning bytes into pixels, in a child process that can be killed."""

    timeout_s: float = Field(20.0, gt=0)
    """Seconds that one image may take before it is a ``TIMEOUT`` row."""
    memory_mb: PositiveInt = 2048
    """Memory that decoding one image may take before it is an ``OUT_OF_MEMORY`` row."""
    max_pixels: PositiveInt = 120_000_000
    """An image of more pixels is ``TOO_LARGE``."""
    gpu_share: float = Field(0.0, ge=0, le=1)
    """Share of the JPEGs that nvJPEG decodes where the model runs (extra ``nvjpeg``), for machines whose cores cannot
    feed their GPU; pixels may differ a little from the CPU's. For GPUs with JPEG engines (A100, A30, H100); without
    them, as on T4 and A10, images are decoded one after the other, which may slow the job down."""


class GeoConfig(Section):
    """Rasters: images of which a window or some bands are read (extra ``geo``)."""

    max_nodata: float = Field(0.5, ge=0, le=1)
    """Share of a tile's samples that may be missing (nodata, mask, alpha) before it is an ``EMPTY`` row."""
    bands: Literal["all"] | tuple[PositiveInt, ...] | None = None
    """Training: the bands that the model will see, from 1, in this order; none: RGB, but all bands where the manifest
    has windows or bands of its own."""
    stretch: Literal["percentile", "deviation", "physical"] = "percentile"
    """Training: what becomes 0 and 255 in each band: its 2nd and 98th percentile, two standard deviations around its
    mean, or ``value_range``."""
    value_range: tuple[float, float] | None = None
    """Of ``physical``: the values, after the raster's scale and offset, that become 0 and 255 in every band."""
    sample_tiles: PositiveInt = 256
    """Training: tiles that the bands' statistics are taken from."""


class ClassifyConfig(Section):
    """How the job runs."""

    unit_rows: PositiveInt | Auto = "auto"
    """Rows per unit, what is decoded, written and retried as one; auto: see ``core.units.choose_unit_rows``."""
    batch_size: PositiveInt | Auto = "auto"
    """Images per forward pass; auto: what was the fastest for a variant of the model, else 256 on a GPU, and on a CPU
    8 at 224 px, up to 64 at smaller sizes."""
    engine: Literal["ray", "local"] = "ray"
    """``ray``, or ``local``: the same stages in a plain loop in this process."""
    backend: Literal[
        "auto",
        "torch",
        "torch_bf16",
        "torch_fp16",
        "torch_compile",
        "openvino",
        "openvino_bf16",
        "openvino_fp32",
        "openvino_int8",
        "mnn_fp32",
        "onnx_int8",
    ] = "auto"
    """What runs the model: torch, or a variant that ``imgbatch model optimize`` has made; auto: the fastest that the
    model holds for the device, else torch."""
    min_agreement: float = Field(0.99, ge=0, le=1)
    """Share of images on which a variant must have had the same label as torch to be taken."""


class ResourcesConfig(Section):
    """How much of the machine or cluster; never changes a result."""

    decode_actors: PositiveInt | Auto = "auto"
    """Processes that fetch images and have them decoded."""
    decode_processes: PositiveInt | Auto = "auto"
    """Of each decode actor: children that decode a unit each, with a core each; auto: one where ``decode_actors`` is
    given."""
    classify_actors: PositiveInt | Auto = "auto"
    """Processes that run the model: one per GPU, or as many as share the cores."""
    classify_threads: PositiveInt | Auto = "auto"
    """Threads that the model runs in over one unit on a CPU."""
    classify_streams: PositiveInt | Auto = "auto"
    """Units that each classify actor runs at once, with one copy of the weights (MNN: one a thread); auto: two on a
    GPU, and on a CPU one where ``classify_actors`` is given."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What the model runs on."""
    decode_labels: dict[str, str] = {}
    """Ray labels that a node must have to decode, like ``{ray.io/market-type: spot}``; values as in Ray's label
    selectors."""
    classify_labels: dict[str, str] = {}
    """Ray labels that a node must have to run the model, like ``{ray.io/accelerator-type: L4}``."""


class TrainConfig(Section):
    """Fine-tuning; every key but ``num_workers``, ``max_failures`` and ``storage`` decides the result."""

    arch: str = "resnet50"
    """A network, or a baseline on a frozen ``backbone``: ``logistic_regression``, ``prototypes``, ``linear_svm`` or
    ``random_forest``."""
    backbone: str = "auto"
    """The network whose features a baseline is fitted to, or ``hog_color``, which needs no weights; auto: that of the
    bundle given as ``weights``, or the one that the name of the weights' file begins with."""
    weights: str | None = None
    """Where to start: a weights file, ``imagenet``, or a model bundle of the same classes, which keeps its head."""
    method: Literal["auto", "fine_tune", "linear_probe", "from_scratch"] = "auto"
    """``fine_tune``: the head on frozen features, then everything; ``linear_probe``: the head only; auto: what
    ``weights`` allow."""
    task: Literal["auto", "binary", "multiclass", "multilabel"] = "auto"
    """auto: multilabel where the manifest has ``targets``, binary where ``target`` has two classes."""
    epochs: PositiveInt = 20
    """Passes over the training images."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Images per optimiser step, over all workers."""
    accumulate: PositiveInt = 1
    """Forward passes that a worker splits its share of a batch into."""
    num_workers: PositiveInt | Auto = "auto"
    """Training processes; auto: one per GPU, or one on CPUs."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides the order of images, their augmentation and fresh weights."""
    deterministic: bool = False
    """Refuse operations whose result depends on timing; slower on GPUs."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """``sgd`` has Nesterov momentum of 0.9."""
    learning_rate: float = Field(1e-3, gt=0)
    """Of the head, at the end of the warm-up; a cosine leads to 0."""
    first_layer_rate: float = Field(0.1, gt=0, le=1)
    """Learning rate of the first layer as a share of the head's; those between lie on a geometric line."""
    weight_decay: float = Field(0.05, ge=0)
    """Never of norms and biases."""
    warmup_epochs: float = Field(1.0, ge=0)
    """Epochs over which learning rates rise from 0; a fifth of a training that has no more."""
    clip_norm: float = Field(1.0, ge=0)
    """Longest gradient, as a norm over all weights; 0: any."""
    l1: float = Field(0.0, ge=0)
    """Strength of an L1 penalty, which makes weights exactly 0; never of norms and biases."""
    loss: Literal["cross_entropy", "focal", "hinge"] = "cross_entropy"
    """``focal`` counts easy images less, ``hinge`` those that are right by a margin not at all (its probabilities need
    ``imgbatch calibrate``); multilabel: of every label."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target's probability that is spread over all classes."""
    imbalance: Literal["none", "weights", "sampler"] = "none"
    """Rare classes count more in the loss, or are drawn more often."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the features that the head does not see, in training."""
    batch_norm: Literal["auto", "frozen", "trained"] = "auto"
    """Whether statistics stay as they are; auto: frozen where there are weights to start from."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Per step, of the running mean of the weights, which is what is measured and kept; 0: the weights themselves."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward pass; auto: bfloat16 on GPUs that have it."""
    metric: Literal["auto", "loss", "top1", "balanced_accuracy", "macro_f1", "mean_average_precision"] = "auto"
    """Of the validation split: the best epoch is kept; auto: mean_average_precision for multilabel, else top1."""
    patience: PositiveInt | None = None
    """Epochs without a better metric after which training stops."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts from the last checkpoint after a worker died."""
    storage: str | None = None
    """Where decoded images and checkpoints are; none: below the output, removed at the end."""


class AugmentConfig(Section):
    """How training images are varied, keyed by seed, epoch and row."""

    min_scale: float = Field(0.35, gt=0, le=1)
    """Smallest share of the image that a random crop takes; 1: the centre crop."""
    flip: Literal["none", "horizontal", "all"] = "horizontal"
    """``all``: both ways and quarter turns, for images without an upside (satellite, microscope)."""
    color_jitter: float = Field(0.0, ge=0, le=1)
    """Strength of changes of brightness, contrast and saturation, a quarter of it of hue; of rasters' bands: of the
    brightness of each."""
    band_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that a band of a raster is replaced by its mean."""
    rand_augment: Annotated[int, Field(ge=0, le=30)] = 0
    """Magnitude of two operations of RandAugment; 0: none."""
    erasing: float = Field(0.0, ge=0, le=1)
    """Probability that a rectangle is erased."""
    mixup: float = Field(0.0, ge=0)
    """alpha of the Beta distribution that pairs of images are mixed by; 0: never."""
    cutmix: float = Field(0.0, ge=0)
    """alpha for rectangles cut from one image into the other; with ``mixup`` too, half of the pairs each."""


class OutputConfig(Section):
    """What is written."""

    path: str | None = None
    """The output directory; may hold many runs."""
    partition_by: tuple[str, ...] = ()
    """Hive partitions: manifest columns, ``label``, ``date`` (of the plan, UTC) or ``bucket:N``."""
    probabilities: Literal["auto", "all", "top_k", "none"] = "auto"
    """``all`` keeps every class's probability, ``top_k`` the best few; auto: all up to 100 classes."""
    top_k: PositiveInt = 5
    """How many classes ``top_k`` lists."""
    embeddings: bool = False
    """Also write what the model's last layer sees of each image."""
    target_file_mb: PositiveInt = 128
    """Size that output files aim at, MB."""
    keep_units: bool = False
    """Keep the unit files after the run has finished."""


class ErrorsConfig(Section):
    """When a run that is going wrong is stopped."""

    max_rate: float = Field(0.05, ge=0, le=1)
    """Share of the last 10,000 rows that may fail; of a retry's rows all may."""
    min_rows: PositiveInt = 1000
    """Rows before the share is judged."""


class RunConfig(Section):
    """How runs follow each other."""

    on_unfinished: Literal["stop", "abandon"] = "stop"
    """What to do about an unfinished run with other settings in the same output."""
    new_run: bool = False
    """Start a second run although one with this fingerprint has finished."""
    log_format: Literal["text", "json"] = "text"
    """``json``: what a run says while it works is one object a line on standard error, with run_id and unit_id, for a
    log collector."""
    no_progress_s: float = Field(1800.0, gt=0)
    """Seconds without a committed unit after which the units under way are tried apart, or, where nothing came since
    the last time, the run ends with exit code 4. A unit's files and pixels may take 0.8 of it; the rows left fail."""
    stop_after_s: float | None = Field(None, gt=0)
    """Seconds from its start after which a command (``classify``, ``retry``, ``repair``) finishes the units in flight
    and ends with exit code 4, to be continued by the same command; none: never. ``train`` refuses it."""


class StorageConfig(Section):
    """Object stores, for every ``s3://`` path. Credentials come from the usual chain (environment, profile, role)."""

    endpoint_url: str | None = None
    """Of a server that speaks S3, ``http://HOST:PORT``; none: ``AWS_ENDPOINT_URL``, else AWS."""
    region: str | None = None
    """none: as the environment or the profile says."""
    profile: str | None = None
    """Of the AWS configuration files of each machine."""
    anonymous: bool = False
    """Requests without credentials, for public buckets."""
    requester_pays: bool = False
    """Whoever reads a bucket of that kind agrees to pay for it."""
    connect_timeout_s: float = Field(5.0, gt=0)
    """Seconds until a connection must stand."""
    read_timeout_s: float = Field(60.0, gt=0)
    """Seconds without a byte after which a request is tried again."""

    @field_validator("endpoint_url")
    @classmethod
    def _is_plain_url(cls, url: str | None) -> str | None:
        parts = urlsplit(url or "http://none")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected http://HOST:PORT or https://HOST")
        if "@" in parts.netloc or parts.query:
            raise ValueError("holds credentials, which do not belong into a configuration; take them out")
        return url


class RayConfig(Section):
    """Where the cluster is."""

    address: str | None = None
    """As for ``ray.init``; none: ``RAY_ADDRESS``, else a Ray of its own on this machine."""
    object_store_mb: PositiveInt | None = None
    """Size of the object store of a Ray of its own, MB; none: sized from the units in flight."""

    @property
    def cluster_address(self) -> str | None:
        """The cluster to connect to; none: a Ray of our own."""
        return self.address or os.environ.get("RAY_ADDRESS") or None


class PlanConfig(Section):
    """Looking ahead: ``imgbatch plan``."""

    sample_rows: Annotated[int, Field(ge=0)] = 32
    """Images to fetch, decode and classify for a forecast; 0: look at none."""
    nodes: dict[str, PositiveInt] = {}
    """Nodes that the job will have: how many of each type, like ``{g6.2xlarge: 4}``."""
    prices: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Price of an hour of a node by type, in any currency."""


class ReportConfig(Section):
    """The page on a run."""

    price_per_hour: float | None = Field(None, ge=0)
    """Price of an hour of everything that the job uses, in any currency; the page then tells the cost."""


class Config(Section):
    """One job's whole configuration."""

    input: InputConfig = InputConfig()
    model: ModelConfig = ModelConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    fetch: FetchConfig = FetchConfig()
    decode: DecodeConfig = DecodeConfig()
    geo: GeoConfig = GeoConfig()
    classify: ClassifyConfig = ClassifyConfig()
    resources: ResourcesConfig = ResourcesConfig()
    train: TrainConfig = TrainConfig()
    augment: AugmentConfig = AugmentConfig()
    output: OutputConfig = OutputConfig()
    errors: ErrorsConfig = ErrorsConfig()
    run: RunConfig = RunConfig()
    storage: StorageConfig = StorageConfig()
    ray: RayConfig = RayConfig()
    plan: PlanConfig = PlanConfig()
    report: ReportConfig = ReportConfig()

    @property
    def on_cluster(self) -> bool:
        """Whether the model runs on a cluster's machines, of whose processors nothing is known here."""
        return self.classify.engine == "ray" and self.ray.cluster_address is not None


def load_config(
    file: str | Path | Mapping[str, Mapping[str, Any]] | None = None,
    assignments: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration from a YAML file, ``section.key=value`` assignments and flags, in rising precedence.

    Args:
        file: a YAML file of sections, what one holds (:func:`parse_sections`), or none.
        assignments: as given to ``--set``; values are read as YAML.
        flags: dotted key to value; a value of ``None`` was not given.

    Raises:
        UsageError: one line that names the key at fault.
    """
    sections = _read_file(file) if isinstance(file, str | Path) else file or {}
    tree = {section: dict(keys) for section, keys in sections.items()}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment}: expected section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {key}: {text!r} is not a YAML value") from error
        _assign(tree, key.strip(), value)
    for key, value in (flags or {}).items():
        if value is not None:
            _assign(tree, key, value)
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> Config:
    """A validated :class:`Config` from nested plain values; raises :class:`UsageError` in one line."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        given = _shown(first["input"])
        # pydantic appends the branch of a union to the location; a person knows only section.key.
        key = ".".join(str(part) for part in first["loc"][:2])
        if first["type"] == "extra_forbidden":
            reason = f"unknown key; one of {', '.join(_known_keys(first['loc']))}"
        elif first["type"] == "tuple_type":
            example = f", like [{given[1:-1]}]" if isinstance(first["input"], str) else ""
            reason = f"expected a list{example} (given: {given})"
        else:
            reason = f"{_lowered(first['msg'].removeprefix('Value error, '))} (given: {given})"
        raise UsageError(f"configuration: {key}: {reason}") from error


def _shown(value: Any) -> str:
    # Bounded in depth and width: lists of YAML that hold each other can be larger than any memory, written out.
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return normalise_message(short.repr(value))


def _lowered(text: str) -> str:
    return text[0].lower() + text[1:]


def option_names() -> list[str]:
    """Every ``section.key``, in order: the public list that a test freezes."""
    return [
        f"{section}.{key}"
        for section, field in Config.model_fields.items()
        for key in field.annotation.model_fields  # type: ignore[union-attr]
    ]


def parse_sections(content: bytes, *, where: str) -> dict[str, dict[str, Any]]:
    """Section to keys of a YAML file, unchecked beyond that; raises :class:`UsageError`, which names ``where``."""
    try:
        tree = yaml.safe_load(content)
    except (yaml.YAMLError, RecursionError) as error:
        detail = " ".join(str(error).split())
        raise UsageError(f"configuration file {where}: not valid YAML: {detail}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(v, dict | None) for v in tree.values()):
        raise UsageError(f"configuration file {where}: expected sections of keys, like 'input: {{manifest: …}}'")
    return {section: keys or {} for section, keys in tree.items()}


def _read_file(file: str | Path) -> dict[str, dict[str, Any]]:
    path = Path(file)
    if "://" in str(file):
        raise UsageError(f"configuration file {file}: no path of this machine; imgbatch.load_config reads it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"configuration file {path}: {error.strerror or error}") from error
    return parse_sections(content, where=str(path))


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    section, dot, key = dotted.partition(".")
    if not dot or not key or "." in key:
        raise UsageError(f"--set {dotted}: expected section.key=value")
    tree.setdefault(section, {})[key] = value


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    if len(location) == 1:
        return list(Config.model_fields)
    section = Config.model_fields[location[0]].annotation
    return list(section.model_fields)  # type: ignore[union-attr]
