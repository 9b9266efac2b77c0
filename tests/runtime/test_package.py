from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from imgbatch.errors import UsageError
from imgbatch.runtime import package as package_module
from imgbatch.runtime.package import collect_package

PRIVATE_KEY = "-----BEGIN PRIVATE KEY-----"


def write(folder, **files: str):
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_files_are_taken_along_but_for_what_is_ignored_or_made_by_tools(tmp_path):
    write(
        tmp_path,
        night_DOT_yaml="a",
        model__model_DOT_json="b",
        _DOT_gitignore="out/\n",
        out__labels="c",
        sub___DOT_rayignore="*.jpg\n",
        sub__photo_DOT_jpg="d",
        sub__list_DOT_csv="e",
        _DOT_git__config="f",
        _DOT_venv__python="g",
    )
    assert list(collect_package(tmp_path).files) == [
        ".gitignore",
        "model/model.json",
        "night.yaml",
        "sub/.rayignore",
        "sub/list.csv",
    ]


def test_a_path_is_in_the_package_if_it_is_a_file_or_a_directory_of_it(tmp_path):
    write(tmp_path, model__model_DOT_json="a", night_DOT_yaml="b")
    package = collect_package(tmp_path)
    assert "model" in package
    assert "./model/" in package
    assert "night.yaml" in package
    assert "mod" not in package
    assert "labels" not in package


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (".env", "PASSWORD=x"),
        (".env.production", ""),
        ("sub/server.key", ""),
        ("cert.pem", ""),
        ("id_ed25519", ""),
        ("credentials", ""),
        ("my-service-account.json", "{}"),
        ("harmless.txt", "-----BEGIN RSA PRIVATE KEY-----\nMII"),
        ("shop-0123abcd.json", f'{{"type": "service_account", "private_key": "{PRIVATE_KEY}"}}'),
        ("secret.yaml", f"stringData:\n  key: |\n    {PRIVATE_KEY}\n"),
        (".git-credentials", ""),
        ("notes.ini", "[default]\naws_secret_access_key = abc\n"),
        ("run.sh", "set -e\nexport AWS_SESSION_TOKEN=abc\n"),
        (".aws/config", ""),
    ],
)
def test_what_looks_like_a_secret_is_refused_by_name(tmp_path, name, text):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(UsageError, match=path.name if ".aws" not in name else r"\.aws"):
        collect_package(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (".env.example", "PASSWORD="),
        ("credentials.py", "def load(): ..."),
        ("test_s3.py", 'S3 = {"AWS_SECRET_ACCESS_KEY": "id"}\n'),
        ("keys.md", "where keys are"),
    ],
)
def test_what_only_speaks_of_secrets_is_taken_along(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert name in collect_package(tmp_path)


def test_the_token_of_the_cluster_is_refused_whatever_it_is_called(tmp_path, monkeypatch):
    (tmp_path / "harmless").write_text("0123456789abcdef")
    assert "harmless" in collect_package(tmp_path)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "harmless"))
    with pytest.raises(UsageError, match="harmless"):
        collect_package(tmp_path)


def test_a_job_can_be_submitted_from_the_checkout():
    root = Path(__file__).parents[2]
    if not (root / ".gitignore").exists():
        pytest.skip("not a checkout")
    assert "jobs/recipes/s3_nightly.yaml" in collect_package(root)


def test_a_secret_that_is_ignored_stays_behind(tmp_path):
    write(tmp_path, _DOT_env="PASSWORD=x", _DOT_rayignore=".env\n")
    assert list(collect_package(tmp_path).files) == [".rayignore"]


def test_a_link_to_a_secret_is_refused_and_a_linked_directory_stays_behind(tmp_path):
    write(tmp_path, home__credentials="x", photos__a_DOT_jpg="y", work__a_DOT_txt="z")
    (tmp_path / "work" / "photos").symlink_to(tmp_path / "photos")
    assert list(collect_package(tmp_path / "work").files) == ["a.txt"]
    (tmp_path / "work" / "settings").symlink_to(tmp_path / "home" / "credentials")
    with pytest.raises(UsageError, match="settings"):
        collect_package(tmp_path / "work")


def test_a_configuration_file_from_elsewhere_is_taken_along_too(tmp_path):
    write(tmp_path, work__a_DOT_txt="a", work__night_DOT_yaml="b", elsewhere__night_DOT_yaml="c")
    inside = collect_package(tmp_path / "work", tmp_path / "work" / "night.yaml")
    assert inside.config == "night.yaml"
    outside = collect_package(tmp_path / "work", tmp_path / "elsewhere" / "night.yaml")
    assert outside.config != "night.yaml"
    assert outside.files[outside.config].read_text() == "c"
    assert outside.files["night.yaml"].read_text() == "b"


def test_an_ignored_configuration_file_is_taken_along_all_the_same(tmp_path):
    write(tmp_path, night_DOT_yaml="a", _DOT_gitignore="*.yaml\n")
    package = collect_package(tmp_path, tmp_path / "night.yaml")
    assert package.config in package.files


def test_too_much_is_refused_with_the_name_of_the_largest_part(tmp_path, monkeypatch):
    monkeypatch.setattr(package_module, "MAX_PACKAGE_BYTES", 1000)
    write(tmp_path, a_DOT_txt="a" * 300, photos__a_DOT_jpg="b" * 600, photos__b_DOT_jpg="c" * 600)
    with pytest.raises(UsageError, match="photos") as error:
        collect_package(tmp_path)
    assert ".rayignore" in str(error.value)


def test_no_such_directory_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="gone"):
        collect_package(tmp_path / "gone")


def test_the_zip_holds_the_files_and_is_the_same_each_time(tmp_path):
    write(tmp_path, work__model__model_DOT_json="a", work__run_DOT_sh="b")
    (tmp_path / "work" / "run.sh").chmod(0o755)
    package = collect_package(tmp_path / "work")
    package.write_zip(tmp_path / "1.zip")
    (tmp_path / "work" / "run.sh").touch()
    package.write_zip(tmp_path / "2.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert archive.namelist() == ["model/model.json", "run.sh"]
        assert archive.getinfo("run.sh").external_attr >> 16 & 0o777 == 0o755
