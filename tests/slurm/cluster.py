"""A real SLURM cluster of several nodes on one machine, in a folder of its own.

    python -m tests.slurm.cluster start DIR      start it; then: source DIR/env
    python -m tests.slurm.cluster stop DIR       stop its daemons, by their pid files

Debian's packages, nothing replaced: munged, mariadbd and slurmdbd for accounting, slurmctld and a
slurmd a node, all of them on 127.0.0.1 with ports of their own; sockets, state and logs in DIR.
Needs root (slurmd does), and a DIR that munge's user may enter.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

PACKAGES = ("slurm-wlm", "slurmctld", "slurmd", "slurm-client", "slurmdbd", "mariadb-server", "munge")
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "munged")
CPUS_A_NODE = 16  # more than there are: jobs of tests share the machine's cores
MEMORY_MB = 64000  # likewise
MAX_ARRAY_SIZE = 12
MOST_SUBMITTED = 7  # jobs of a user in the partition "few"
FOLDERS = ("munge", "state", "pids", "logs", "spool", "database")
NODE_DOWN_SECONDS = 10  # without word from a slurmd
SECONDS_TO_START = 90.0

SLURM_CONF = """\
ClusterName=bench
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[slurmctld]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=10
StateSaveLocation={root}/state
SlurmctldPidFile={root}/pids/slurmctld
SlurmctldLogFile={root}/logs/slurmctld
SlurmdSpoolDir={root}/spool/%n
SlurmdPidFile={root}/pids/slurmd-%n
SlurmdLogFile={root}/logs/slurmd-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=500
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageEnforce=limits
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[slurmdbd]}
AccountingStoragePass={root}/munge/socket
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=20
WaitTime=1
SlurmdTimeout={node_down}
MessageTimeout=10
MaxArraySize={max_array_size}
MaxJobCount=50000
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
PartitionName=main Nodes=ALL Default=YES MaxTime=1-00:00:00 State=UP PriorityTier=1
PartitionName=spot Nodes=ALL MaxTime=1-00:00:00 State=UP PriorityTier=1 PreemptMode=CANCEL
PartitionName=few Nodes=ALL MaxTime=1-00:00:00 State=UP PriorityTier=1 QOS=few
PartitionName=urgent Nodes=ALL MaxTime=1-00:00:00 State=UP PriorityTier=9
"""

NODE_LINE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory={mb}\n"

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={ports[slurmdbd]}
SlurmUser=root
PidFile={root}/pids/slurmdbd
LogFile={root}/logs/slurmdbd
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
"""


class MissingError(Exception):
    """What a cluster cannot be started without, and what to do about it."""


class Cluster:
    """Daemons of a cluster whose files are in `root`; the commands find it by `environment`."""

    def __init__(
        self, root: Path, nodes: tuple[str, ...] = ("n1", "n2", "n3"), max_array_size: int = MAX_ARRAY_SIZE
    ) -> None:
        self.root, self.nodes, self.max_array_size = root.resolve(), nodes, max_array_size
        self.conf = self.root / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        """Start everything and return when all nodes are idle; MissingError, RuntimeError with the logs' ends.

        What a cluster that was stopped has left in the folder is removed.
        """
        require_programs()
        if self.is_running():
            raise RuntimeError(f"a cluster runs in {self.root} already: source {self.root / 'env'}, or stop it first")
        host = socket.gethostname()
        ports = dict(zip(("slurmctld", "slurmdbd", *self.nodes), _free_ports(2 + len(self.nodes)), strict=True))
        for folder in FOLDERS:
            shutil.rmtree(self.root / folder, ignore_errors=True)
            (self.root / folder).mkdir(parents=True)
        for name in self.nodes:
            (self.root / "spool" / name).mkdir(exist_ok=True)
        self.root.chmod(0o755)
        values = {"root": self.root, "host": host, "ports": ports}
        text = SLURM_CONF.format(**values, max_array_size=self.max_array_size, node_down=NODE_DOWN_SECONDS)
        for name in self.nodes:
            text += NODE_LINE.format(name=name, host=host, port=ports[name], cpus=CPUS_A_NODE, mb=MEMORY_MB)
        self.conf.write_text(text)
        database_conf = self.root / "slurmdbd.conf"
        database_conf.write_text(SLURMDBD_CONF.format(**values) + f"StoragePass={'x' * 8}\n")
        database_conf.chmod(0o600)
        (self.root / "env").write_text(f"export SLURM_CONF={self.conf}\n")
        try:
            self._start_munged()
            self._start_database()
            self._start_slurm(database_conf)
        except BaseException:
            self.stop()
            raise

    def is_running(self) -> bool:
        """Whether any of the daemons is, by the pid files."""
        return bool(self._daemons())

    def _start_munged(self) -> None:
        folder = self.root / "munge"
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for path in (folder, key):
            shutil.chown(path, "munge", "munge")
        if not succeeds(["runuser", "-u", "munge", "--", "test", "-x", str(folder)]):
            raise MissingError(f"munge's user may not enter {self.root}: take a folder below /var/tmp")
        files = {"key-file": key, "socket": folder / "socket", "pid-file": folder / "pid"}
        files |= {"log-file": folder / "log", "seed-file": folder / "seed"}
        run(["runuser", "-u", "munge", "--", "munged", "--force", *(f"--{k}={v}" for k, v in files.items())])
        (self.root / "pids" / "munged").symlink_to(folder / "pid")

    def _start_database(self) -> None:
        data, sock = self.root / "database", self.root / "database.socket"
        run(["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db"])
        options = ["--no-defaults", "--user=root", "--skip-networking", "--skip-grant-tables"]
        options += [f"--datadir={data}", f"--socket={sock}", f"--pid-file={self.root / 'pids' / 'mariadbd'}"]
        options += ["--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0"]
        self._spawn(["mariadbd", *options, "--innodb-lock-wait-timeout=900"], "mariadbd")
        sql = ["mariadb", "--no-defaults", f"--socket={sock}", "-e", "create database if not exists slurm_acct_db"]
        wait_until(lambda: succeeds(sql), "mariadbd answers")

    def _start_slurm(self, database_conf: Path) -> None:
        # slurmdbd finds the database by the client library's default socket, unless told in its environment.
        sock = {"MYSQL_UNIX_PORT": str(self.root / "database.socket")}
        self._spawn(["slurmdbd", "-D"], "slurmdbd", sock | {"SLURM_CONF": str(database_conf.with_name("slurm.conf"))})
        register = ["sacctmgr", "--immediate", "add", "cluster", "bench"]
        wait_until(lambda: succeeds(register, self.environment), "slurmdbd answers")
        limit = f"MaxSubmitJobsPerUser={MOST_SUBMITTED}"
        run(["sacctmgr", "--immediate", "add", "qos", "few", limit], self.environment)
        run(["slurmctld", "-f", str(self.conf)])
        for name in self.nodes:
            self.start_node(name)
        query = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%t"]
        wait_until(
            lambda: output(query, self.environment).split() == ["idle"] * len(self.nodes),
            f"all nodes are idle; logs in {self.root / 'logs'}",
        )

    def start_node(self, name: str) -> None:
        run(["slurmd", "-f", str(self.conf), "-N", name])

    def kill_node(self, name: str) -> None:
        """What a power cut does: slurmd, its job steps' managers and all their processes are gone at once."""
        daemon = int((self.root / "pids" / f"slurmd-{name}").read_text())
        steps = [psutil.Process(pid) for pid in self._processes_on(name)]
        managers = {each.pid for step in steps for each in step.parents() if each.name() == "slurmstepd"}
        for pid in [daemon, *managers, *(step.pid for step in steps)]:  # those that would tell of it first
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _processes_on(self, name: str) -> list[int]:
        """What jobs run on a node of this cluster."""
        return [pid for pid in _processes() if f"SLURMD_NODENAME={name}" in _environment(pid, self.conf)]

    def stop(self) -> None:
        """End every daemon by its pid file, jobs first; returns when they are gone."""
        if self.conf.exists():
            subprocess.run(
                ["scancel", "--signal=KILL", "--full", "--user=root"],
                env=os.environ | self.environment,
                capture_output=True,
                timeout=20,
                check=False,
            )
            for name in self.nodes:  # what a killed slurmctld or slurmd would leave behind
                for pid in self._processes_on(name):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        for pid in self._daemons():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + 10
            while _is_alive(pid) and time.monotonic() < deadline:
                time.sleep(0.05)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _daemons(self) -> list[int]:
        """The live processes that the pid files name, clients before what they talk to."""
        pids = []
        for path in sorted((self.root / "pids").glob("*"), key=lambda path: -_stop_order(path.name)):
            with contextlib.suppress(OSError, ValueError):
                pid = int(path.read_text())
                said = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
                if str(self.root).encode() in said:  # not another's that came after, and has its number
                    pids.append(pid)
        return pids

    def _spawn(self, command: list[str], name: str, environment: dict[str, str] | None = None) -> None:
        """A daemon that stays in the foreground, put into the background."""
        with (self.root / "logs" / f"{name}.out").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=os.environ | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        (self.root / "pids" / name).write_text(str(process.pid))


@contextlib.contextmanager
def running_cluster(nodes: tuple[str, ...], max_array_size: int = MAX_ARRAY_SIZE) -> Iterator[Cluster]:
    """A cluster in a new folder, which SLURM's commands find from this process on; stopped and removed at the end.

    SLURM_TEST_LOGS in the environment names a folder to keep the daemons' logs in.
    """
    root = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own folder is closed to munge's user
    cluster = Cluster(root, nodes, max_array_size)
    try:
        cluster.start()
        os.environ.update(cluster.environment)
        yield cluster
    finally:
        os.environ.pop("SLURM_CONF", None)
        cluster.stop()
        if logs := os.environ.get("SLURM_TEST_LOGS"):
            shutil.copytree(root / "logs", logs, dirs_exist_ok=True)
        shutil.rmtree(root, ignore_errors=True)


def require_programs() -> None:
    """MissingError where a cluster cannot be started, saying what to do."""
    if os.geteuid() != 0:
        raise MissingError("a SLURM cluster on this machine needs root: run the tests as root, as in a container")
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise MissingError(
            f"{', '.join(missing)} not installed: apt-get install --no-install-recommends {' '.join(PACKAGES)}"
        )


def run(command: list[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stdout[-2000:]}")
    return done.stdout


def output(command: list[str], environment: dict[str, str]) -> str:
    """What a command prints; nothing if it fails or does not answer."""
    try:
        return run(command, environment)
    except (RuntimeError, subprocess.TimeoutExpired):
        return ""


def succeeds(command: list[str], environment: dict[str, str] | None = None) -> bool:
    try:
        run(command, environment)
    except RuntimeError:
        return False
    return True


def wait_until(holds: Callable[[], bool], what: str, seconds: float = SECONDS_TO_START) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {seconds:.0f} s in vain until {what}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _stop_order(name: str) -> int:
    """Clients before what they talk to."""
    order = ("munged", "mariadbd", "slurmdbd", "slurmctld")
    return order.index(name) if name in order else len(order)


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _environment(pid: int, conf: Path) -> list[str]:
    """A process's environment, if it is of the cluster with this configuration."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
    return entries if f"SLURM_CONF={conf}" in entries else []


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def main(words: list[str]) -> int:
    if len(words) != 2 or words[0] not in ("start", "stop"):
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    cluster = Cluster(Path(words[1]))
    try:
        if words[0] == "stop":
            cluster.stop()
        else:
            cluster.start()
            print(f"{len(cluster.nodes)} nodes are up; now: source {cluster.root / 'env'}")
    except (MissingError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
