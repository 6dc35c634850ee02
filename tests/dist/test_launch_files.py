"""`launch/`: every way to start two nodes gives the training of two processes, bit for bit.

Nodes are agents of their own on loopback, or in network namespaces where these can be made.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from launching import LIMIT_S, ROOT, TEST_LIMIT_S, finish, free_port, logged, start, wait_until
from tiny_run import sound_run
from tone_shards import SCORES, write_tones

from mmssl.cli import USER_ERROR
from mmssl.types import PREEMPTED
from mmssl.yamlfile import write_yaml

LAUNCH = ROOT / "launch"
JOB = "4711"
FAKES = {
    # Two nodes of one task each on this machine. As with Slurm, signals go on to the tasks, and
    # those that have not ended a while after the first one are killed.
    "srun": """#!{python}
import os, psutil, signal, sys, time
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
def start(i):
    step = dict(SLURM_NODEID=i, SLURM_PROCID=i, SLURM_LOCALID=0, SLURM_STEP_NUM_TASKS=2)
    return psutil.Popen(words, env=os.environ | {{k: str(v) for k, v in step.items()}})
tasks = [start(i) for i in range(2)]
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda n, _: [task.send_signal(n) for task in tasks])
end = float("inf")
while alive := [task for task in tasks if task.poll() is None]:
    time.sleep(0.1)
    if len(alive) < len(tasks):
        end = min(end, time.monotonic() + 5)
    if time.monotonic() > end:
        for process in [p for task in alive for p in (*task.children(recursive=True), task)]:
            process.kill()
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
""",
    "scontrol": """#!/bin/bash
case $1 in show) printf '%s\\n' 127.0.0.1 localhost ;; requeue) echo "$2" >> "$REQUEUED" ;; esac
""",
    # a trainer that saves nothing: waits for a signal, or fails on its last rank
    "python": """#!/bin/bash
exec {python} "${{@/#mmssl.cli/rank}}"
""",
    "rank.py": """import os, pathlib, signal, sys, time
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: (time.sleep(float(os.environ["RANK"]) / 2), sys.exit(75)))
pathlib.Path(sys.argv[1] + os.environ["RANK"]).touch()
time.sleep(0.5)
if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1 and len(sys.argv) > 2:
    os.kill(os.getpid(), 9) if sys.argv[2] == "killed" else sys.exit(int(sys.argv[2]))
time.sleep(60)
""",
}


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PATH with a Slurm of two nodes on this machine."""
    folder = tmp_path_factory.mktemp("fakes")
    for name, text in FAKES.items():
        (folder / name).write_text(text.format(python=sys.executable))
        (folder / name).chmod(0o755)
    return folder


def succeed(*processes: subprocess.Popen[str]) -> None:
    for code, said in finish(*processes):
        assert code == 0, said


# ---------------------------------------------------------------- two nodes, the same training


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`train` and its arguments: a tiny run over shards of sound."""
    folder = tmp_path_factory.mktemp("tones")
    shards = write_tones(folder / "corpus", SCORES * 2)
    tree = sound_run(str(shards), {"steps": 3, "zero": 2})
    (folder / "run.yaml").write_text(write_yaml(tree))
    return ["train", str(folder / "run.yaml")]


@pytest.fixture(scope="module")
def expected(training: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The losses of two processes of one node."""
    out = tmp_path_factory.mktemp("runs") / "local"
    local = [LAUNCH / "local.sh", "2", *training, f"out={out}"]
    succeed(start(local, PYTHON=sys.executable))
    found = logged(out)
    assert [step for step, *_ in found] == [1, 2, 3]
    return found


def agents(words: Sequence[str]) -> list[list[str]]:
    """The commands of two nodes on loopback."""
    place = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    agent = [sys.executable, "-m", "mmssl.launch", *place, "--nproc-per-node", "1"]
    return [[*agent, "--node-rank", str(i), "-m", "mmssl.cli", *words] for i in range(2)]


def hosts(words: Sequence[str], folder: Path) -> list[list[str]]:
    """The commands of deepspeed's launcher on the two entries of a hostfile."""
    hostfile = folder / "hostfile"
    hostfile.write_text("# two names of this machine\n127.0.0.1 slots=1\nlocalhost slots=1\n")
    place = ["--hostfile", str(hostfile), "--master_addr", "127.0.0.1", "--master_port"]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *place, free_port(), "--no_ssh"]
    module = ["--module", "mmssl.cli", *words]
    return [[*launcher, "--node_rank", str(i), *module] for i in range(2)]


def pods(words: Sequence[str]) -> Iterator[tuple[list[str], dict[str, str]]]:
    """The command and environment of each pod of the job, on loopback."""
    job = kubernetes()["Job"]["spec"]
    box = job["template"]["spec"]["containers"][0]
    env = {entry["name"]: entry["value"] for entry in box["env"]} | {"OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "PROCESSES": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for i in range(job["completions"]):
        yield [*box["command"], *words], env | {"JOB_COMPLETION_INDEX": str(i)}


@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.parametrize("way", ["agents", "hostfile", "tasks of srun", "sbatch", "pods"])
def test_two_nodes_train_as_two_processes_do(
    way: str, training: list[str], expected: Any, fakes: Path, tmp_path: Path
) -> None:
    words, path = [*training, f"out={tmp_path / 'run'}"], f"{fakes}:{os.environ['PATH']}"
    if way == "agents":
        succeed(*map(start, agents(words)))
    elif way == "hostfile":
        succeed(*map(start, hosts(words, tmp_path)))
    elif way == "tasks of srun":
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        succeed(start(["srun", sys.executable, "-m", "mmssl.cli", *words], PATH=path, **meet))
    elif way == "sbatch":
        succeed(start([LAUNCH / "slurm.sbatch", *words], **job_env(fakes, tmp_path)))
        assert not (tmp_path / "requeued").exists()
    else:
        succeed(*(start(command, **env) for command, env in pods(words)))
    assert logged(tmp_path / "run") == expected


def can_make_namespaces() -> bool:
    if not all(map(shutil.which, ("unshare", "ip"))):
        return False
    probe = ["unshare", "-rn", "ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1"]
    return subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.skipif(not can_make_namespaces(), reason="network namespaces need rights")
def test_two_nodes_in_network_namespaces(
    training: list[str], expected: Any, tmp_path: Path
) -> None:
    """Each node has an address and a loopback of its own, joined by one wire."""
    words = " ".join([*training, f"out={tmp_path / 'run'}"])
    script = f"""set -eu
    node() {{ # NUMBER WIRE
        ip link set lo up; ip addr add 10.77.0.$(($1 + 1))/24 dev "$2"; ip link set "$2" up
        GLOO_SOCKET_IFNAME=$2 exec {sys.executable} -m mmssl.launch --nnodes 2 --node-rank "$1" \\
            --nproc-per-node 1 --master-addr 10.77.0.1 --master-port 29500 -m mmssl.cli {words}
    }}
    export -f node
    ip link add v0 type veth peer name v1
    unshare -n bash -c 'until ip link show v1 &> /dev/null; do sleep 0.1; done; node 1 v1' &
    other=$!
    until [[ $(readlink /proc/$other/ns/net) != $(readlink /proc/self/ns/net) ]]; do
        sleep 0.1
    done
    ip link set v1 netns $other
    (node 0 v0)
    wait $other"""
    succeed(start(["unshare", "-rn", "bash", "-c", script]))
    assert logged(tmp_path / "run") == expected


# ---------------------------------------------------------------- preemption and failures


def job_env(fakes: Path, folder: Path) -> dict[str, str | Path]:
    """What Slurm sets in a batch script."""
    return {
        "PATH": f"{fakes}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": JOB,
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "MASTER_PORT": free_port(),
        "REQUEUED": folder / "requeued",
    }


def wait_for(*paths: Path) -> None:
    wait_until(lambda: all(path.exists() for path in paths), "the ranks did not start")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks_and_their_code_comes_back(
    number: signal.Signals, fakes: Path, tmp_path: Path
) -> None:
    agent = [sys.executable, "-m", "mmssl.launch", "--standalone", "--nproc-per-node", "2"]
    process = start([*agent, "-m", "rank", tmp_path / "up"], PYTHONPATH=f"{ROOT}:{fakes}")
    wait_for(tmp_path / "up0", tmp_path / "up1")
    process.send_signal(number)
    ((code, said),) = finish(process)
    assert code == PREEMPTED, said


def test_a_signal_before_the_nodes_have_met_is_a_preemption(tmp_path: Path) -> None:
    place = ["--nnodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port"]
    agent = [sys.executable, "-m", "mmssl.launch", *place, free_port()]
    process = start([*agent, "-m", "rank"])
    sockets, port = psutil.Process(process.pid).net_connections, int(agent[-1])
    wait_until(lambda: any(c.laddr.port == port for c in sockets()), "the agent does not listen")
    process.send_signal(signal.SIGTERM)
    ((code, said),) = finish(process)
    assert code == PREEMPTED, said


@pytest.mark.parametrize(("how", "code"), [("3", 3), ("killed", 128 + signal.SIGKILL)])
def test_the_first_failure_gives_the_exit_code(
    how: str, code: int, fakes: Path, tmp_path: Path
) -> None:
    agent = [sys.executable, "-m", "mmssl.launch", "--standalone", "--nproc-per-node", "2"]
    process = start([*agent, "-m", "rank", tmp_path / "up", how], PYTHONPATH=f"{ROOT}:{fakes}")
    assert [found for found, _ in finish(process)] == [code]


def test_a_preempted_job_goes_back_into_the_queue(fakes: Path, tmp_path: Path) -> None:
    """The whole chain: Slurm's signal to the tasks, agents, ranks, codes, requeue."""
    env = job_env(fakes, tmp_path) | {"PYTHON": fakes / "python"}
    batch = [LAUNCH / "slurm.sbatch", tmp_path / "up"]
    process = start(batch, **env, PYTHONPATH=f"{ROOT}:{fakes}")
    wait_for(tmp_path / "up0", tmp_path / "up1")
    (srun,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGUSR1)  # the shell has to outlive it
    srun.send_signal(signal.SIGUSR1)
    ((code, said),) = finish(process)
    assert code == PREEMPTED, said
    assert (tmp_path / "requeued").read_text().split() == [JOB]


@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_preempted_training_goes_on_as_if_nothing_had_been(
    training: list[str], tmp_path: Path
) -> None:
    agent = [sys.executable, "-m", "mmssl.launch", "--standalone", "--nproc-per-node", "2"]
    command = [*agent, "-m", "mmssl.cli", *training, "train.steps=60"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    succeed(start([*command, f"out={whole}"]))
    process = start([*command, f"out={part}"])
    wait_until(lambda: len(logged(part)) >= 3, "the training does not start")
    process.send_signal(signal.SIGUSR1)
    ((code, said),) = finish(process)
    assert code == PREEMPTED, said
    assert 3 <= len(logged(part)) < 60
    succeed(start([*command, f"out={part}"]))
    assert logged(part) == logged(whole)
    assert [step for step, *_ in logged(part)] == list(range(1, 61))


def test_a_failed_job_does_not(fakes: Path, tmp_path: Path) -> None:
    env = job_env(fakes, tmp_path) | {"PYTHON": fakes / "python"}
    words = [LAUNCH / "slurm.sbatch", tmp_path / "up", "3"]
    ((code, said),) = finish(start(words, **env, PYTHONPATH=f"{ROOT}:{fakes}"))
    assert code == 128 + signal.SIGKILL, said  # of the other node, which had to be killed
    assert "exitcode  : 3" in said
    assert not (tmp_path / "requeued").exists()


# ---------------------------------------------------------------- the files


def kubernetes() -> dict[str, Any]:
    """The manifests by kind; claims by their names."""
    trees = list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))
    claim = "PersistentVolumeClaim"
    return {t["metadata"]["name"] if t["kind"] == claim else t["kind"]: t for t in trees}


def test_the_kubernetes_job_agrees_with_itself() -> None:
    found = kubernetes()
    job, service = found["Job"], found["Service"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (box,) = pod["containers"]
    env = {entry["name"]: entry["value"] for entry in box["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(env["NNODES"])
    assert int(env["PROCESSES"]) == box["resources"]["limits"]["nvidia.com/gpu"]
    # rank 0 is found by the name that the headless service gives to the first pod
    name, port = job["metadata"]["name"], int(env["MASTER_PORT"])
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert env["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    assert [port] == [p["port"] for p in service["spec"]["ports"]]
    assert [port] == [p["containerPort"] for p in box["ports"]]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in box["volumeMounts"]} == volumes.keys()
    claims = [v["persistentVolumeClaim"]["claimName"] for k, v in volumes.items() if k != "shm"]
    assert sorted(claims) == sorted(found.keys() - {"Job", "Service"})
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


def test_the_kubernetes_job_knows_the_exit_codes() -> None:
    spec = kubernetes()["Job"]["spec"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # else a podFailurePolicy is refused
    by_code = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
            by_code |= dict.fromkeys(rule["onExitCodes"]["values"], rule["action"])
    assert by_code == {USER_ERROR: "FailJob", PREEMPTED: "Ignore"}
    assert pod["terminationGracePeriodSeconds"] > 30


@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch"])
def test_scripts_parse_and_say_how_they_are_called(name: str) -> None:
    path = LAUNCH / name
    subprocess.run(["bash", "-n", path], check=True)
    done = subprocess.run([path], capture_output=True, text=True, env=os.environ | {"PYTHON": "true"})
    assert done.returncode == USER_ERROR
    assert f"launch/{name}" in done.stderr


def test_slurm_knows_the_exit_code_and_signals_ahead() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))
    sent, ahead_s = options["signal"].split("@")  # without `B:`, which would spare the tasks
    assert (sent, options["ntasks-per-node"]) == ("USR1", "1")
    assert int(ahead_s) > 30
    assert "requeue" in options
    assert re.search(r"code -eq (\d+)", text).group(1) == str(PREEMPTED)


def test_the_hostfile_is_one_for_deepspeed() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    found = fetch_hostfile(str(LAUNCH / "hostfile.example"))
    assert dict(found) == {"node-0": 8, "node-1": 8}
