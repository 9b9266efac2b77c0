"""What README, CONTRIBUTING and SECURITY name is there: commands and their options, keys, Make targets, paths, links,
imports, extras.

Command lines are parsed by the command line's own parser, short of running them.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.exceptions import TyperException

from imgbatch.cli import app
from imgbatch.config import Config, load_config, option_names, parse_config, parse_sections
from imgbatch.errors import UsageError
from imgbatch.runtime.forecast import price_per_hour

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
LAYOUT_HEADINGS = ("Reading the code", "Where things are, in reading order")

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^ {4}\S.*$", re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND_LINE = re.compile(r"(?:\$ )?((?:[A-Z_]+=\S+ )*(?:imgbatch|make)(?: .*)?)")
OPTION = re.compile(r"--?[a-z][a-z-]*")
EXTRA = re.compile(r"extra `([a-z0-9]+)`|`([a-z0-9]+)`\s+extra\b|imgbatch\[([a-z0-9]+)\]")
INSTALLED = re.compile(r"pip install \"\.\[([a-z0-9,]+)\]\"")
DOTTED = re.compile(r"[a-z_]+\.[a-z_]+")
FILE_SUFFIXES = {"csv", "html", "json", "jsonl", "lock", "md", "parquet", "py", "safetensors", "sql", "toml", "yaml"}


def problems(text: str) -> list[str]:
    """Everything that ``text``, a Markdown document in the repository's root, names and that is not there."""
    return [
        *(f"{line}: {problem}" for line in command_lines(text) for problem in problems_of_line(line)),
        *(f"`{span}`: {problem}" for span in spans(text) for problem in problems_of_span(span)),
        *(f"({link}): no such file" for link in relative_links(text) if not (ROOT / link).exists()),
        *(f"`{path}`: no such path" for path in layout_paths(text) if not is_there(path)),
        *(problem for code in blocks(text, "python") for problem in problems_of_python(code)),
        *(f"{name}: no such extra" for name in sorted(extras(text) - set(declared_extras()))),
    ]


def blocks(text: str, *languages: str) -> Iterator[str]:
    return (body for language, body in FENCED.findall(text) if language in languages)


def command_lines(text: str) -> list[str]:
    """The lines for ``imgbatch`` and ``make`` in fenced ``sh`` and ``console`` blocks and in indented ones."""
    prose = FENCED.sub("", text)
    code = "\n".join([*blocks(text, "sh", "console"), *INDENTED.findall(prose)]).replace("\\\n", " ")
    matches = (COMMAND_LINE.fullmatch(line.strip()) for line in code.splitlines())
    return [match[1] for match in matches if match]


def spans(text: str) -> list[str]:
    return SPAN.findall(FENCED.sub("", text))


def relative_links(text: str) -> list[str]:
    links = LINK.findall(FENCED.sub("", text))
    return [link.partition("#")[0] for link in links if "://" not in link and not link.startswith("#")]


def extras(text: str) -> set[str]:
    """Of ours, as text or code names them."""
    installed = (name for names in INSTALLED.findall(text) for name in names.split(","))
    return {name for names in EXTRA.findall(text) for name in names if name}.union(installed)


def declared_extras() -> dict[str, list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def extras_within(extra: str) -> set[str]:
    """``extra`` and all that it asks for."""
    named = {name for each in declared_extras()[extra] for name in re.findall(r"imgbatch\[(.+)\]", each)}
    return {extra}.union(*(extras_within(name) for names in named for name in names.split(",")))


def layout_paths(text: str) -> list[str]:
    """What the first column of the table under a layout's heading names."""
    for heading in LAYOUT_HEADINGS:
        _, found, rest = text.partition(f"\n## {heading}\n")
        if found:
            rows = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("| `")]
            return [path for row in rows for path in SPAN.findall(row.split("|")[1])]
    return []


def problems_of_line(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    while "=" in words[0]:  # an environment variable before the command
        words.pop(0)
    name, *arguments = words
    return problems_of_make(arguments) if name == "make" else problems_of_command(arguments)


def problems_of_make(arguments: list[str]) -> list[str]:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    return [f"no target {word}" for word in arguments if "=" not in word and word not in targets]


def problems_of_command(arguments: list[str]) -> list[str]:
    command, path, arguments = resolve([word for word in arguments if word != "--debug"])
    if subcommands(command):
        return [f"no command {' '.join([*path, *arguments[:1]])}"]
    try:
        context = command.make_context(path[-1], list(arguments))
        load_config(assignments=context.params.get("assignments") or ())
    except TyperException as error:
        return [error.format_message()]
    except UsageError as error:
        return [str(error)]
    return []


def resolve(words: list[str]) -> tuple[Any, list[str], list[str]]:
    """The command that ``words`` lead to from the top, the words that led there, and the rest."""
    command, path, rest = typer.main.get_command(app), [], words
    while rest and rest[0] in subcommands(command):
        command, path, rest = subcommands(command)[rest[0]], [*path, rest[0]], rest[1:]
    return command, path, rest


def subcommands(command: Any) -> dict[str, Any]:
    return getattr(command, "commands", {})


def option_strings(command: Any) -> set[str]:
    """Every option of ``command`` and of the commands below it."""
    own = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    return own.union({"--help"}, *(option_strings(below) for below in subcommands(command).values()))


def problems_of_span(span: str) -> list[str]:
    """A span in running text may leave arguments out, but what it names exists."""
    if span.startswith("imgbatch "):
        command, _, rest = resolve(span.split()[1:])
        known = option_strings(command) | {"--debug"}
        if subcommands(command) and rest and not rest[0].startswith("-"):
            return [f"no command {rest[0]}"]
        return [f"no option {word}" for word in rest if OPTION.fullmatch(word) and word not in known]
    if span.startswith("make ") or " make " in span:
        return problems_of_line(span)
    if OPTION.match(span):
        word = span.split()[0]
        return [] if word in option_strings(typer.main.get_command(app)) else ["no command has this option"]
    if is_key(span):
        return [] if span in option_names() else ["no such configuration key"]
    if is_path(span) and not is_there(span):
        return ["no such path"]
    return []


def is_key(span: str) -> bool:
    """Whether ``span`` reads like ``section.key``, and neither like a file nor like ``torch.compile``."""
    section, _, key = span.partition(".")
    if not DOTTED.fullmatch(span) or key in FILE_SUFFIXES:
        return False
    return section in Config.model_fields or importlib.util.find_spec(section) is None


def is_path(span: str) -> bool:
    """Whether ``span`` names something in the repository: a module, or anything in a folder of the code."""
    folders = ("imgbatch", "jobs", "notebooks", "tests", "cluster", "core", "runtime", "report", "commands")
    return span.endswith(".py") or ("/" in span and span.partition("/")[0] in folders)


def is_there(path: str) -> bool:
    """Paths are given from the root, those of modules also from the package."""
    return any(any(base.glob(path)) for base in (ROOT, ROOT / "imgbatch"))


def problems_of_python(code: str) -> list[str]:
    """Names that an example imports, and configuration keys that it assigns."""
    tree = ast.parse(code)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    keys = [key for key, equals, _ in (text.partition("=") for text in texts) if equals and is_key(key)]
    return [
        *(
            f"{node.module} has no {alias.name}"
            for node in imports
            for alias in node.names
            if not hasattr(importlib.import_module(node.module or ""), alias.name)
        ),
        *(f"{key}: no such configuration key" for key in keys if key not in option_names()),
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_everything_that_is_named_is_there(document):
    assert problems(document.read_text()) == []


@pytest.mark.parametrize("recipe", sorted((ROOT / "jobs/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_configuration(recipe):
    assert load_config(recipe) != Config()


def test_the_configuration_that_the_readme_shows_is_one():
    (nightly,) = blocks(README.read_text(), "yaml")
    config = parse_config(parse_sections(nightly.encode(), where="README.md"))
    assert price_per_hour(config.plan, None)
    assert config.run.on_unfinished == "abandon"


def test_make_installs_the_extras_that_the_readme_says():
    said = re.search(r"all extras but ((?:`\w+`(?:, | and )?)+)", README.read_text())
    assert said
    assert set(declared_extras()) - extras_within("dev") - {"all"} == set(SPAN.findall(said[1]))
    assert "--extra dev" in (ROOT / "Makefile").read_text()


def test_every_extra_that_a_message_names_is_there():
    named = {name for path in (ROOT / "imgbatch").rglob("*.py") for name in extras(path.read_text())}
    assert {"baselines", "geo", "openvino"} <= named
    assert named <= set(declared_extras())


def test_the_checker_sees_what_the_readme_holds():
    text = README.read_text()
    commands = {tuple(resolve(shlex.split(line)[1:])[1]) for line in command_lines(text) if line.startswith("imgbatch")}
    assert {("classify",), ("manifest", "build"), ("model", "init"), ("verify",), ("query",)} <= commands
    assert {line.split()[1] for line in command_lines(text) if line.startswith("make")} >= {"demo", "test"}
    assert len([span for span in spans(text) if is_key(span)]) >= 8
    assert len(layout_paths(text)) >= 8
    assert "CONTRIBUTING.md" in relative_links(text)
    assert {"baselines", "openvino"} <= extras(text)
    assert set(Config.model_fields) > {span.partition(".")[0] for span in spans(text) if span in option_names()}


def test_the_readme_can_be_followed_from_the_top():
    """What refuses to overwrite is written once, and what training reads has splits."""
    made: dict[str, str] = {}
    for line in command_lines(README.read_text()):
        words = shlex.split(line, comments=True)
        command = " ".join(resolve(words[1:])[1])
        if command == "train":
            assert "--split" in made[words[words.index("--manifest") + 1]]
        if command in ("manifest build", "manifest tile", "model init", "train", "calibrate"):
            output = words[words.index("-o") + 1]
            assert output not in made
            made[output] = line
    assert len(made) >= 8


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("```console\n$ imgbatch classify -m model --manifst m.parquet -o labels\n```", "--manifst"),
        ("```sh\nimgbatch clasify -m model\n```", "clasify"),
        ("```console\n$ imgbatch manifest bild photos\n```", "bild"),
        ("```console\n$ imgbatch manifest\n```", "manifest"),
        ("```console\n$ imgbatch review export labels\n```", "--output"),
        ("```console\n$ imgbatch verify labels another\n```", "another"),
        ("```console\n$ imgbatch classify -m model \\\n    --manifest m.parquet --engin local\n```", "--engin"),
        ("```console\n$ imgbatch classify --set classify.unit_row=16\n```", "unit_row"),
        ("```console\n$ imgbatch classify --set classify.unit_rows=many\n```", "unit_rows"),
        ("```sh\nmake dmeo    # everything\n```", "dmeo"),
        ("    make lint tset\n", "tset"),
        ("Then `make dmeo`.", "dmeo"),
        ("`IMGBATCH_TEST_DATA=FOLDER make tset` adds some.", "tset"),
        ("See `imgbatch verfy`.", "verfy"),
        ("See `imgbatch query --fromat csv`.", "--fromat"),
        ("With `--new-runn` it starts again.", "--new-runn"),
        ("The share `errors.maxrate` stops it, as `errors.max_rate` does.", "errors.maxrate"),
        ("The key `fetsh.retries` is in no section.", "fetsh.retries"),
        ("It is in `imgbatch/core/plans.py`.", "plans.py"),
        ("It is in `jobs/benches/`.", "jobs/benches/"),
        ("[How](CONTRIBUTE.md#habits) to help.", "CONTRIBUTE.md"),
        ("# x\n\n## Reading the code\n\n| | |\n| --- | --- |\n| `imgbatch/cli.py`, `notebok/` | both |\n", "notebok/"),
        ("It needs the extra `goe`.", "goe"),
        ('`pip install ".[report,opnvino]"` is enough.', "opnvino"),
        ("With the\n`baseline` extra it is fitted.", "baseline"),
        ("```python\nfrom imgbatch import clasify\n```", "clasify"),
        ('```python\nload_config("a.yaml", ["output.paht=labels"])\n```', "output.paht"),
    ],
)
def test_one_planted_mistake_is_found(text, word):
    (problem,) = problems(text)
    assert word in problem


@pytest.mark.parametrize(
    "text",
    [
        "```console\n$ imgbatch verify labels --debug   # a comment\nok   r30cf373d0c44 files: 4 files\n```",
        "```console\n$ imgbatch classify -c nightly.yaml --set classify.unit_rows=16\n```",
        "`imgbatch query`, `--set section.key=value`, `-c config.yaml`, `query.sql`, `core/plan.py`, `jobs/bench/*.py`",
        "`torch.compile`, [Ray](https://www.ray.io), [above](#limits)",
    ],
)
def test_what_is_right_is_left_alone(text):
    assert problems(text) == []
