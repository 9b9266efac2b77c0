"""What a submitted job takes along: the files of the working directory as one zip, and never a secret."""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

from imgbatch.errors import UsageError

MAX_PACKAGE_BYTES = 100 * 2**20
"""Every node downloads the package from the head, which keeps it in memory; data belongs on shared storage."""

LEFT_OUT = frozenset(
    {".git", ".venv", "venv", "__pycache__", "node_modules", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
)
"""Directories that no job needs, beside what ``.gitignore`` and ``.rayignore`` say."""

SECRET_NAMES = (
    ".env",
    ".env.*",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "*.jks",
    "*.kdbx",
    "id_rsa*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    "credentials",
    "credentials.json",
    "credentials.csv",
    "*accesskeys.csv",
    "rootkey.csv",
    "*service?account*.json",
    "kubeconfig*",
    "auth_token",
    ".netrc",
    ".git-credentials",
    ".boto",
    ".s3cfg",
    "application_default_credentials.json",
    ".pgpass",
    ".pypirc",
    ".npmrc",
    ".htpasswd",
    ".dockercfg",
)
SECRET_FOLDERS = frozenset({".aws", ".ssh", ".gnupg", ".kube", ".docker", ".azure"})
SECRET_VARIABLES = (
    "RAY_AUTH_TOKEN_PATH",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "GOOGLE_APPLICATION_CREDENTIALS",
)
"""Environment variables that name a file of credentials."""
SECRET_EXAMPLES = (".env.example", ".env.sample", ".env.template")

_log = logging.getLogger(__name__)
_SNIFFED_BYTES = 64 * 2**10
_SECRET_CONTENT = re.compile(
    rb"(?:^\s*|\"private_key\"\s*:\s*\")-----BEGIN [A-Z ]*PRIVATE KEY-----"
    rb"|^\s*(?:export\s+)?aws_(?:secret_access_key|session_token)\s*[=:]\s*\S+",
    re.IGNORECASE | re.MULTILINE,
)
_CONFIG_FOLDER = ".imgbatch"


@dataclass(frozen=True)
class Package:
    """The files of a job by their path in its working directory."""

    files: dict[str, Path]
    config: str | None
    """Where the job finds its configuration file."""

    def __contains__(self, path: str) -> bool:
        """Whether the file or directory ``path`` is taken along."""
        wanted = Path(path).as_posix()
        return any(name == wanted or name.startswith(f"{wanted}/") for name in self.files)

    def write_zip(self, path: Path) -> None:
        """Same files, same bytes: the cluster recognises a package that it has."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, source in self.files.items():
                entry = zipfile.ZipInfo(name)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = (source.stat().st_mode & 0o777) << 16
                archive.writestr(entry, source.read_bytes())


def collect_package(folder: Path, config_file: Path | None = None) -> Package:
    """The files below ``folder`` that a job takes along, and its configuration file wherever that lies.

    What ``.gitignore`` and ``.rayignore`` exclude stays behind. So do links to directories.

    Raises:
        UsageError: a file that looks like a secret would go along, or the whole is larger than 100 MiB.
    """
    if not folder.is_dir():
        raise UsageError(f"--working-dir {folder}: no such directory")
    files: dict[str, Path] = {}
    sizes: Counter[str] = Counter()
    for path in _walk(folder.absolute(), []):
        name = path.relative_to(folder.absolute())
        _refuse_secret(path, name.as_posix())
        files[name.as_posix()] = path
        sizes[name.parts[0]] += path.stat().st_size
        if sizes.total() > MAX_PACKAGE_BYTES:
            largest = sizes.most_common(1)[0][0]
            raise UsageError(
                f"--working-dir {folder}: more than {MAX_PACKAGE_BYTES // 2**20} MiB, most of it in {largest}; name it "
                f"in {folder / '.rayignore'}, or submit from a directory of its own (data belongs on shared storage)"
            )
    config = None
    if config_file is not None:
        source = config_file.absolute()
        _refuse_secret(source, str(config_file))
        known = [name for name, path in files.items() if path == source]
        config = known[0] if known else f"{_CONFIG_FOLDER}/{source.name}"
        files[config] = source
    return Package(dict(sorted(files.items())), config)


def _walk(folder: Path, excludes: list[Callable[[Path], bool]]) -> Iterator[Path]:
    excludes = [*excludes, *get_excludes_from_ignore_files(folder, include_gitignore=True, logger=_log)]
    for path in sorted(folder.iterdir()):
        if any(excluded(path) for excluded in excludes):
            continue
        if not path.is_dir():
            if path.is_file():
                yield path
        elif path.name in SECRET_FOLDERS:
            raise UsageError(f"{path}: a directory of credentials would go along; submit from another directory")
        elif path.name not in LEFT_OUT and not path.is_symlink():
            yield from _walk(path, excludes)


def _refuse_secret(path: Path, shown: str) -> None:
    """A link counts by what it points to, too."""
    for name in {path.name, path.resolve().name}:
        if name not in SECRET_EXAMPLES and any(fnmatch(name.lower(), pattern) for pattern in SECRET_NAMES):
            raise _secret(shown)
    if path.resolve() in {Path(os.environ[name]).resolve() for name in SECRET_VARIABLES if os.environ.get(name)}:
        raise _secret(shown)
    with path.open("rb") as file:
        if _SECRET_CONTENT.search(file.read(_SNIFFED_BYTES)):
            raise _secret(shown)


def _secret(shown: str) -> UsageError:
    return UsageError(
        f"{shown}: looks like a secret and is not sent; name it in .rayignore (nodes get credentials from their role)"
    )
