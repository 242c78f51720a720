"""The multi-node recipe over two hosts: network namespaces with a cable between them, and nothing else in common but
the disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fms_parallel.training.metrics import METRICS, read_metrics
from tests.distributed.test_scripts import ROOT, SMALL

ADDRESSES = ("10.213.7.1", "10.213.7.2")
HOSTS = tuple(f"fms-{os.getpid()}-{number}" for number in range(2))


def command(words: str) -> None:
    subprocess.run(words.split(), check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, ...]]:
    """Names of two namespaces that reach each other; skips where the machine forbids them."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts need network namespaces: this machine has no `ip` command")
    try:
        cable = [f"fms{os.getpid() % 10**8}{end}" for end in "ab"]
        for host in HOSTS:
            command(f"ip netns add {host}")
        command(f"ip link add {cable[0]} type veth peer name {cable[1]}")
        for host, address, end in zip(HOSTS, ADDRESSES, cable, strict=True):
            command(f"ip link set {end} netns {host}")
            command(f"ip netns exec {host} ip addr add {address}/24 dev {end}")
            command(f"ip netns exec {host} ip link set {end} up")
            command(f"ip netns exec {host} ip link set lo up")
        yield HOSTS
    except subprocess.CalledProcessError as error:
        pytest.skip(f"two hosts need network namespaces: {' '.join(error.cmd)}: {error.stderr.strip()}")
    finally:
        for host in HOSTS:  # the cable goes with them
            subprocess.run(["ip", "netns", "delete", host], capture_output=True, check=False)


def torchrun(host: str, node: int, *words: str) -> subprocess.Popen[str]:
    recipe = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=two"]
    # The name of this machine leads to an address that neither namespace has, so what is usually found out is said.
    recipe += [f"--rdzv_endpoint={ADDRESSES[0]}:29511", f"--local_addr={ADDRESSES[node]}"]
    recipe += [f"--rdzv_conf=is_host={node == 0}"]
    started = [sys.executable, "-m", "torch.distributed.run", *recipe, "scripts/train_causal.py", *words]
    device = subprocess.run(
        ["ip", "netns", "exec", host, "ip", "-o", "-4", "addr", "show", "scope", "global"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": device}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *started], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / METRICS)]


def test_two_hosts_train_what_one_process_trains(hosts: tuple[str, ...], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 400)
    words = [*SMALL, "--dataset_path", str(text), "--steps", "3", "--default_dtype", "fp64"]
    both = [
        torchrun(host, node, *words, "--distributed", "tp=2,sp", "--output_path", str(tmp_path / "two"))
        for node, host in enumerate(hosts)
    ]
    said = [process.communicate(timeout=180) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    alone = [sys.executable, "scripts/train_causal.py", *words, "--output_path", str(tmp_path / "one")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(alone, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=180)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-12)
