"""A kubelet for tests: runs a pod of a manifest as it stands, in namespaces of this machine.

The container has the root file system of the image, read-only, with the interpreter of these
tests for its own; the volumes of the manifest where it mounts them; the manifest's user, without
capabilities; and processes of its own, of which the entry point is the first.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY, kill_tree
from tests.k8s.rendered import Manifest, container_of, image_variables, variables

SOURCE = "/opt/src"  # where the package is found; the image has it installed


@dataclass
class Pod:
    """One that runs; it speaks into a file."""

    process: subprocess.Popen[bytes]
    output: Path

    def terminate(self) -> None:
        """What a kubelet does first to a pod that must go: SIGTERM to its first process."""
        (first,) = psutil.Process(self.process.pid).children()
        first.send_signal(signal.SIGTERM)

    def said(self) -> str:
        return self.output.read_text()

    def ended(self, timeout: float = 120) -> int:
        """Its exit code, when it has ended."""
        return self.process.wait(timeout=timeout)

    def kill(self) -> None:
        if self.process.poll() is None:
            kill_tree(self.process.pid)
            self.process.wait()


@dataclass
class Kubelet:
    """Starts pods whose claim is a directory."""

    claim: Path
    configs: dict[str, str]
    """The ConfigMap's data."""
    scratch: Path
    """A directory for what belongs to pods."""
    hosts: dict[str, str] = field(default_factory=dict)
    """Addresses by name: the cluster's DNS."""
    pods: list[Pod] = field(default_factory=list)

    def start(self, job: Manifest, index: int = 0, network: str | None = None) -> Pod:
        """Start the pod of an index of a job, in a network namespace if one is named."""
        directory = self.scratch / f"pod{len(self.pods)}"
        directory.mkdir()
        script = "\n".join(["set -eu", *self._root(job, directory), self._exec(job, index)])
        inside = ["ip", "netns", "exec", network] if network else []
        output = directory / "output.txt"
        with output.open("w") as file:
            process = subprocess.Popen(
                [*inside, *_UNSHARE, "bash", "-c", script], stdout=file, stderr=file
            )
        self.pods.append(Pod(process, output))
        return self.pods[-1]

    def _root(self, job: Manifest, directory: Path) -> list[str]:
        """Commands that make the container's root file system."""
        root = directory / "root"
        etc = directory / "etc"
        for made in (root, etc, etc / "cmkd", directory / "configs"):
            made.mkdir()
        names = {"localhost": "127.0.0.1", **self.hosts}
        (etc / "hosts").write_text("".join(f"{a} {name}\n" for name, a in names.items()))
        (etc / "nsswitch.conf").write_text("hosts: files\n")
        for name, text in self.configs.items():
            (directory / "configs" / name).write_text(text)
        image = {
            "/usr": "/usr",
            "/sys": "/sys",
            str(etc): "/etc",
            sys.base_prefix: sys.base_prefix,
            sys.prefix: str(Path(image_variables()["PYTHON"]).parents[1]),
            str(REPOSITORY / "launchers"): "/opt/cmkd/launchers",
            str(REPOSITORY / "cmkd_scale"): f"{SOURCE}/cmkd_scale",
        }
        at = {mount["name"]: mount for mount in container_of(job)["volumeMounts"]}
        lines = [f"root={shlex.quote(str(root))}", 'mount -t tmpfs -o mode=755 tmpfs "$root"']
        lines += [f"cp -P /{name} $root/" for name in ("bin", "lib", "lib64", "sbin")]
        lines += [_bind(source, target) for source, target in image.items()]
        lines += ['mkdir "$root/proc" "$root/dev"', 'mount -t proc proc "$root/proc"']
        lines.append('ln -s /proc/self/fd "$root/dev/fd"')
        for device in ("null", "zero", "random", "urandom"):
            lines.append(
                f'touch "$root/dev/{device}"; mount --bind /dev/{device} "$root/dev/{device}"'
            )
        for volume in job["template"]["spec"]["volumes"]:
            mount = at[volume["name"]]
            target = mount["mountPath"]
            if "emptyDir" in volume:
                lines.append(
                    f'mkdir -p "$root{target}"; mount -t tmpfs -o mode=1777 tmpfs "$root{target}"'
                )
            elif "configMap" in volume:
                lines.append(_bind(str(directory / "configs"), target))
            else:
                lines.append(_bind(str(self.claim), target, "rw"))
        group = job["template"]["spec"]["securityContext"]["fsGroup"]
        lines.append(f"chown -R :{group} {shlex.quote(str(self.claim))}")
        lines.append(f"chmod -R g+rwX {shlex.quote(str(self.claim))}")
        assert container_of(job)["securityContext"]["readOnlyRootFilesystem"]
        return [*lines, 'mount -o remount,ro "$root"']

    def _exec(self, job: Manifest, index: int) -> str:
        """The command that becomes the container."""
        container, context = container_of(job), job["template"]["spec"]["securityContext"]
        told = {**image_variables(), "PYTHONPATH": SOURCE, **variables(container, index)}
        words = [
            *("setpriv", f"--reuid={context['runAsUser']}", f"--regid={context['runAsGroup']}"),
            *("--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"),
            *("env", "-i", "-C", container["workingDir"]),
            *(f"{name}={value}" for name, value in told.items()),
            *container["command"],
            *container["args"],
        ]
        return f'exec chroot "$root" {shlex.join(words)}'


_UNSHARE = ("unshare", "--mount", "--pid", "--fork", "--kill-child")


def _bind(source: str, target: str, how: str = "ro") -> str:
    place = f'"$root"{shlex.quote(target)}'
    bound = f"mkdir -p {place}; mount --bind {shlex.quote(source)} {place}"
    return f"{bound}; mount -o remount,bind,ro {place}" if how == "ro" else bound


def needs_namespaces() -> None:
    """Skip where pods cannot be run."""
    tried = subprocess.run(
        [*_UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
    )
    if tried.returncode:
        pytest.skip(f"no namespaces here: {tried.stderr!r}")
