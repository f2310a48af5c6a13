"""The image of the Docker engine: how it is built, named and found.

No registry is needed: the base `debootstrap` is a minimal Debian made from packages and imported. Any other base is an
image that the engine has or can pull. Where the base has a Python 3.11 or newer with numpy, pyarrow, datasets and PIL,
that one is used inside; else the harness's own is mounted read-only at its path.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation_env.errors import SandboxError
from curation_env.sandbox.base import SandboxConfig, SandboxUnavailable

if TYPE_CHECKING:
    import docker
    from docker.models.images import Image

REPOSITORY = "curation-sandbox"
RECIPE_LABEL = "curation-env.recipe"
PYTHON_LABEL = "curation-env.python"
DEBOOTSTRAP = "debootstrap"
BUILD_COMMAND = "curation-env sandbox build"
MODULES = ("numpy", "pyarrow", "datasets", "PIL")

_FOLDER = Path(__file__).resolve().parent / "image"
_CHECK = "import ctypes, json, select, socket, ssl, sys; assert sys.version_info >= (3, 11); import " + ", ".join(
    MODULES
)


def connect() -> docker.DockerClient:
    """The engine that the environment names (DOCKER_HOST), or the local one.

    Raises:
        SandboxUnavailable: None answers.
    """
    if "DOCKER_HOST" not in os.environ and not Path("/var/run/docker.sock").exists():
        raise SandboxUnavailable(
            "no Docker daemon runs here: start it (`systemctl start docker`, or `bash .ci/docker.sh`)"
        )
    import docker
    import requests

    try:
        client = docker.from_env(timeout=60)
        client.ping()
    except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
        raise SandboxUnavailable(
            f"the Docker daemon does not answer ({error}): start it, or check its socket"
        ) from error
    return client


def recipe() -> str:
    """Digest of everything that an image is made from but its base; an image of another recipe is not used."""
    digest = hashlib.blake2b(digest_size=6)
    for name in ("Dockerfile", "packages.txt"):
        digest.update((_FOLDER / name).read_bytes())
    return digest.hexdigest()


def find_image(client: docker.DockerClient) -> Image:
    """The newest image of the present recipe. Raises `SandboxUnavailable` with the command that builds one."""
    images: list[Any] = client.images.list(filters={"label": f"{RECIPE_LABEL}={recipe()}"})
    if not images:
        raise SandboxUnavailable(f"the sandbox image is not built: {BUILD_COMMAND}")
    return max(images, key=lambda image: str(image.attrs["Created"]))


def build_image(base: str = DEBOOTSTRAP, *, say: Callable[[str], None] = print) -> str:
    """Build the image on `base` and try it; returns its tag `curation-sandbox:<digest>`. A minute with debootstrap.

    Raises:
        SandboxUnavailable: No Docker daemon, no debootstrap, a base that can't be had, or one on which no Python runs.
    """
    client = connect()
    try:
        base_tag = _debootstrap(client, say) if base == DEBOOTSTRAP else _given(client, base, say)
        return _build(client, base, base_tag, say)
    finally:
        client.close()


def _build(client: docker.DockerClient, base: str, base_tag: str, say: Callable[[str], None]) -> str:
    base_id = client.images.get(base_tag).id
    python = "image" if _has_python(client, base_tag) else "harness"
    tag = f"{REPOSITORY}:{hashlib.blake2b((recipe() + str(base_id)).encode(), digest_size=6).hexdigest()}"
    untried = f"{tag}-untried"
    say(f"building {tag} on {base} (Python: the {python}'s)")
    common: dict[str, Any] = {"network_mode": "none", "rm": True, "forcerm": True}
    client.images.build(
        path=str(_FOLDER), tag=untried, buildargs={"BASE": base_tag}, labels={PYTHON_LABEL: python}, **common
    )
    try:
        try:
            _try(untried)
        except SandboxError as error:
            raise SandboxUnavailable(
                f"no Python runs on {base}; it needs a POSIX shell and a system not older than this machine's, or a "
                f"Python 3.11 or newer of its own with {', '.join(MODULES)}: {error}",
                details=error.details,
            ) from error
        # The label by which images are found comes last: no sandbox that starts meanwhile takes one that doesn't work.
        client.images.build(
            fileobj=io.BytesIO(f"FROM {untried}\n".encode()), tag=tag, labels={RECIPE_LABEL: recipe()}, **common
        )
    finally:
        client.images.remove(untried, force=True)
    return tag


def _given(client: docker.DockerClient, base: str, say: Callable[[str], None]) -> str:
    """An image that the engine has, or pulls."""
    import docker

    try:
        if not client.images.list(name=base):
            say(f"pulling {base}")
            client.images.pull(base)
    except docker.errors.APIError as error:
        raise SandboxUnavailable(f"there is no image {base}, and it can't be pulled: {error.explanation}") from error
    return base


def _debootstrap(client: docker.DockerClient, say: Callable[[str], None]) -> str:
    """A minimal Debian from packages, imported as `curation-base:<suite>-<packages>`; made once."""
    suite = _debian_suite()
    packages = (_FOLDER / "packages.txt").read_text().split()
    tag = f"curation-base:{suite}-{hashlib.blake2b(' '.join(packages).encode(), digest_size=6).hexdigest()}"
    if client.images.list(name=tag):
        return tag
    program = shutil.which(DEBOOTSTRAP, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    other = f"or build on an image: {BUILD_COMMAND} --base IMAGE"
    if program is None:
        raise SandboxUnavailable(f"debootstrap is not installed: apt-get install debootstrap, {other}")
    if os.geteuid() != 0:
        raise SandboxUnavailable(f"debootstrap needs root: sudo {BUILD_COMMAND}, {other}")
    with tempfile.TemporaryDirectory(prefix="curation-image-") as folder:
        root = Path(folder) / "root"
        say(f"debootstrap {suite} (about a minute)")
        done = subprocess.run(
            [program, "--variant=minbase", "--include=" + ",".join(packages), suite, str(root)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise SandboxUnavailable(f"debootstrap failed: {done.stdout[-1000:]}{done.stderr[-1000:]}")
        archive = Path(folder) / "root.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(root, arcname="/", filter=_needed)
        client.api.import_image_from_file(str(archive), repository=tag.split(":")[0], tag=tag.split(":")[1])
    return tag


def _needed(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out package archives and device nodes (Docker makes its own)."""
    unneeded = ("var/cache/apt/", "var/lib/apt/lists/", "usr/share/doc/", "usr/share/man/")
    if member.ischr() or member.isblk() or any(part in member.name + "/" for part in unneeded):
        return None
    return member


def _debian_suite() -> str:
    """This machine's Debian release, else the oldest that Python 3.11 comes with."""
    found = {}
    for line in Path("/etc/os-release").read_text().splitlines():
        key, _, value = line.partition("=")
        found[key] = value.strip('"')
    return found.get("VERSION_CODENAME", "bookworm") if found.get("ID") == "debian" else "bookworm"


def _has_python(client: docker.DockerClient, image: str) -> bool:
    import docker

    try:
        client.containers.run(
            image, ["python3", "-c", _CHECK], entrypoint=[], remove=True, network_mode="none", environment={}
        )
    except (docker.errors.ContainerError, docker.errors.APIError):
        return False
    return True


def _try(tag: str) -> None:
    """Start a sandbox on the new image and import what an agent needs."""
    from curation_env.sandbox.docker import DockerSandbox

    with tempfile.TemporaryDirectory(prefix="curation-image-") as folder:
        with DockerSandbox(SandboxConfig(workspace=Path(folder)), image=tag) as sandbox:
            result = sandbox.exec(["python", "-c", _CHECK], timeout=120)
    if result.exit_code != 0:
        raise SandboxError(result.stderr.decode(errors="replace")[-1000:])
