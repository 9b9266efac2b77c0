from __future__ import annotations

import pytest
from pydantic import ValidationError

from imgbatch.config import Config, load_config, option_names, parse_config
from imgbatch.errors import UsageError

OPTIONS = [
    "input.manifest",
    "input.limit",
    "input.duplicates",
    "input.skip_existing",
    "input.since_run",
    "input.if_changed",
    "model.path",
    "preprocess.resize_size",
    "preprocess.crop_size",
    "preprocess.resize_mode",
    "preprocess.median_size",
    "preprocess.reducing_gap",
    "fetch.timeout_s",
    "fetch.retries",
    "fetch.in_flight",
    "fetch.max_bytes",
    "fetch.hedge_after_s",
    "fetch.client",
    "fetch.schemes",
    "fetch.roots",
    "fetch.private_addresses",
    "decode.timeout_s",
    "decode.memory_mb",
    "decode.max_pixels",
    "decode.gpu_share",
    "geo.max_nodata",
    "geo.bands",
    "geo.stretch",
    "geo.value_range",
    "geo.sample_tiles",
    "classify.unit_rows",
    "classify.batch_size",
    "classify.engine",
    "classify.backend",
    "classify.min_agreement",
    "resources.decode_actors",
    "resources.decode_processes",
    "resources.classify_actors",
    "resources.classify_threads",
    "resources.classify_streams",
    "resources.device",
    "resources.decode_labels",
    "resources.classify_labels",
    "train.arch",
    "train.backbone",
    "train.weights",
    "train.method",
    "train.task",
    "train.epochs",
    "train.batch_size",
    "train.accumulate",
    "train.num_workers",
    "train.seed",
    "train.deterministic",
    "train.optimizer",
    "train.learning_rate",
    "train.first_layer_rate",
    "train.weight_decay",
    "train.warmup_epochs",
    "train.clip_norm",
    "train.l1",
    "train.loss",
    "train.label_smoothing",
    "train.imbalance",
    "train.dropout",
    "train.batch_norm",
    "train.ema_decay",
    "train.precision",
    "train.metric",
    "train.patience",
    "train.max_failures",
    "train.storage",
    "augment.min_scale",
    "augment.flip",
    "augment.color_jitter",
    "augment.band_dropout",
    "augment.rand_augment",
    "augment.erasing",
    "augment.mixup",
    "augment.cutmix",
    "output.path",
    "output.partition_by",
    "output.probabilities",
    "output.top_k",
    "output.embeddings",
    "output.target_file_mb",
    "output.keep_units",
    "errors.max_rate",
    "errors.min_rows",
    "run.on_unfinished",
    "run.new_run",
    "run.log_format",
    "run.no_progress_s",
    "run.stop_after_s",
    "storage.endpoint_url",
    "storage.region",
    "storage.profile",
    "storage.anonymous",
    "storage.requester_pays",
    "storage.connect_timeout_s",
    "storage.read_timeout_s",
    "ray.address",
    "ray.object_store_mb",
    "plan.sample_rows",
    "plan.nodes",
    "plan.prices",
    "report.price_per_hour",
]
"""The public list. A new option is a decision: add it here with it."""


def test_the_list_of_options_is_frozen():
    assert option_names() == OPTIONS


def test_defaults_need_nothing():
    config = load_config()
    assert config == Config()
    assert config.errors.max_rate == 0.05
    assert config.classify.engine == "ray"


def test_flags_win_over_assignments_over_the_file_over_defaults(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("output: {path: from-file, top_k: 3, keep_units: true}\nfetch:\n  retries: 1\n")
    config = load_config(file, ["output.top_k=4", "output.path=from-set"], {"output.path": "from-flag"})
    assert config.output.path == "from-flag"
    assert config.output.top_k == 4
    assert config.output.keep_units is True
    assert config.fetch.retries == 1
    assert config.fetch.in_flight == 32


def test_a_flag_that_was_not_given_changes_nothing():
    assert load_config(None, ["output.path=out"], {"output.path": None}).output.path == "out"


def test_an_empty_file_and_an_empty_section_are_the_defaults(tmp_path):
    file = tmp_path / "job.yaml"
    for text in ("", "fetch:\n"):
        file.write_text(text)
        assert load_config(file) == Config()


@pytest.mark.parametrize(
    ("assignment", "value"),
    [("output.partition_by=[date, split]", ("date", "split")), ("output.partition_by=[]", ())],
)
def test_values_of_assignments_are_yaml(assignment, value):
    assert load_config(None, [assignment]).output.partition_by == value


def test_a_value_may_hold_an_equals_sign():
    assert load_config(None, ["output.path=s3://bucket/day=1"]).output.path == "s3://bucket/day=1"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("output.top_k", "--set output.top_k: expected section.key=value"),
        ("top_k=3", "--set top_k: expected section.key=value"),
        ("output.a.b=3", "--set output.a.b: expected section.key=value"),
        ("output.path=[1", "--set output.path: '[1' is not a YAML value"),
        ("output.tpo_k=3", "configuration: output.tpo_k: unknown key; one of path, partition_by"),
        ("outptu.top_k=3", "configuration: outptu: unknown key; one of input, model"),
        ("output.top_k=0", "configuration: output.top_k: input should be greater than or equal to 1 (given: 0)"),
        ("errors.max_rate=2", "configuration: errors.max_rate: input should be less than or equal to 1 (given: 2)"),
        ("fetch.timeout_s=0", "configuration: fetch.timeout_s: input should be greater than 0 (given: 0)"),
        (
            "storage.endpoint_url=host:1",
            "configuration: storage.endpoint_url: expected http://HOST:PORT or https://HOST",
        ),
        ("classify.engine=spark", "configuration: classify.engine: input should be 'ray' or 'local' (given: 'spark')"),
        ("decode.memory_mb=much", "configuration: decode.memory_mb: input should be a valid integer"),
        ("resources.decode_actors=many", "configuration: resources.decode_actors: "),
        (
            "output.partition_by=date",
            "configuration: output.partition_by: expected a list, like [date] (given: 'date')",
        ),
        ("geo.value_range=3", "configuration: geo.value_range: expected a list (given: 3)"),
    ],
)
def test_a_wrong_assignment_is_one_line_that_names_it(assignment, message):
    with pytest.raises(UsageError) as caught:
        load_config(None, [assignment])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_credentials_in_an_endpoint_are_refused_and_not_repeated():
    with pytest.raises(UsageError, match="holds credentials") as caught:
        load_config(None, ["storage.endpoint_url=http://someone:hidden@host:1"])
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected sections of keys"),
        ("output: 3\n", "expected sections of keys"),
        ("output: {path: [}\n", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, text, message):
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_config(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line_that_names_it(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.yaml: No such file or directory"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_file_that_is_no_path_is_one_line_that_says_what_reads_it():
    with pytest.raises(UsageError, match=r"^configuration file s3://shop/nightly\.yaml: .*imgbatch\.load_config"):
        load_config("s3://shop/nightly.yaml")


def test_a_configuration_survives_storing():
    config = load_config(None, ["output.partition_by=[date]", "classify.unit_rows=64"])
    assert parse_config(config.model_dump(mode="json")) == config


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValidationError):
        Config().output.top_k = 3


def test_every_option_is_documented_where_it_is_declared():
    import ast
    import inspect

    import imgbatch.config

    undocumented = [
        f"{node.name}.{field.target.id}"
        for node in ast.parse(inspect.getsource(imgbatch.config)).body
        if isinstance(node, ast.ClassDef) and node.name not in ("Section", "Config")
        for field, following in zip(node.body, [*node.body[1:], None], strict=True)
        if isinstance(field, ast.AnnAssign)
        and not (isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant))
    ]
    assert undocumented == []
