"""Who is in a job whose ranks come and go: generations of members, agreed through the launcher's store.

    dead/UID           why a member is dead, by whoever finds out: its supervisor, or one that hears nothing of it
    lost/G             a member of generation G is dead: all of them stop waiting and meet again
    meet/G+1/UID       what a survivor of G says of itself (its committed step, ...)
    joins, join/N      newcomers, in the order in which they asked
    plan/G+1           the members of G+1 in rank order, and what each said: written once, by the first that is alive

The store outlives every member: torchrun's agent holds it, or the test that starts the job. It knows the store and the
process group of all ranks; no models.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fms_parallel import compat
from fms_parallel.distributed import start
from fms_parallel.distributed.start import BACKENDS
from fms_parallel.dynamic.connections import Connections
from fms_parallel.errors import TrainingError
from fms_parallel.log import get_logger

logger = get_logger(__name__)

POLL = 0.005
"""Seconds between two looks at the store."""

PREFIX = "fms_parallel/elastic"


@dataclass(frozen=True)
class Plan:
    """A generation: its members in rank order, and what each of them said when it met (newcomers say nothing)."""

    generation: int
    members: tuple[str, ...]
    said: Mapping[str, Any]


class Membership:
    """One member's view of the job.

    Args:
        connect: a new connection to the store, for each thread one.
        uid: this member's name, never used before in this job.
        members: of the first generation in rank order; None: this one joins a job that runs.
        timeout: seconds that a collective waits. silence: seconds without a heartbeat until a member counts as dead
            (frozen, or cut off). meeting: seconds that a new generation gets to connect.
    """

    def __init__(
        self,
        connect: Callable[[], dist.Store],
        uid: str,
        members: Sequence[str] | None = None,
        *,
        device_type: str = "cpu",
        timeout: float = 600.0,
        silence: float = 5.0,
        meeting: float = 10.0,
    ) -> None:
        self.uid, self.backend = uid, BACKENDS[device_type]
        self.timeout, self.silence, self.meeting = timeout, silence, meeting
        self._connect = connect
        self.store = dist.PrefixStore(PREFIX, connect())
        self.connections = Connections()
        self.plan: Plan | None = None
        self.first = None if members is None else Plan(0, tuple(members), {})
        self.lost = threading.Event()
        self.lost_since: float | None = None
        self._seen_joins = 0
        self._watch = Watch(self, dist.PrefixStore(PREFIX, connect()))

    # ---- generations --------------------------------------------------------------------------------------------

    def begin(self) -> Plan:
        """Enter the first generation, or the next one as a newcomer; a process group runs afterwards."""
        self._watch.start()
        if self.first is not None:
            return self._enter(self.first)
        number = int(self.store.add("joins", 1))
        self.store.set(f"join/{number}", self.uid)
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if self.store.check(["latest"]):
                plan = self._read(int(self.store.get("latest")))
                if plan is not None and self.uid in plan.members:
                    return self._enter(plan)
            time.sleep(POLL)
        raise TrainingError(f"member {self.uid} asked to join and was not let in within {self.timeout:.0f} s.")

    def wanted(self) -> bool:
        """Whether a newcomer asks to join. Only one rank needs to look."""
        return self.store.check(["joins"]) and int(self.store.get("joins")) > self._seen_joins

    def meet(self, said: Any, admit: bool = False) -> Plan:
        """Leave this generation and enter the next, with everybody who is alive.

        Args:
            said: plain JSON values, told to all in the plan. admit: with the newcomers; all members say the same.
        Raises:
            TrainingError: the others have given this member up, or nobody comes.
        """
        assert self.plan is not None
        old, deadline = self.plan, time.monotonic() + self.timeout
        generation = old.generation
        while True:
            generation += 1
            self.store.set(f"meet/{generation}/{self.uid}", json.dumps(said))
            plan = self._agreed(generation, old.members, deadline, admit)
            self.leave()
            try:
                return self._enter(plan)
            except Exception as error:  # a member was lost while the generation formed: with the others, once more
                logger.warning("generation %d did not form: %s", generation, error)
                self.report_lost(generation)
                old = plan

    def _agreed(self, generation: int, members: Sequence[str], deadline: float, admit: bool) -> Plan:
        """The plan of a generation; written by the first member that is alive, when all that are alive have met."""
        while True:
            plan = self._read(generation)
            if plan is not None:
                if self.uid not in plan.members:
                    raise TrainingError(f"member {self.uid} was given up by the others: it was silent or cut off.")
                return plan
            alive = [uid for uid in members if not self.is_dead(uid)]
            if self.uid not in alive:
                reason = self.store.get(f"dead/{self.uid}").decode()
                raise TrainingError(f"member {self.uid} was given up by the others: {reason}.")
            met = [uid for uid in alive if self.store.check([f"meet/{generation}/{uid}"])]
            if alive[0] == self.uid and met == alive:
                self._write(generation, alive, admit)
            if time.monotonic() > deadline:
                absent = ", ".join(sorted(set(alive) - set(met)))
                raise TrainingError(f"members {absent} did not meet the others within {self.timeout:.0f} s.")
            time.sleep(POLL)

    def _write(self, generation: int, alive: list[str], admit: bool) -> None:
        said = {uid: json.loads(self.store.get(f"meet/{generation}/{uid}")) for uid in alive}
        joins = int(self.store.get("joins")) if admit and self.store.check(["joins"]) else self._seen_joins
        asking = [self.store.get(f"join/{n}").decode() for n in range(self._seen_joins + 1, joins + 1)]
        new = [uid for uid in asking if not self.is_dead(uid)]
        text = json.dumps({"members": [*alive, *new], "said": said, "joins": joins})
        self.store.compare_set(f"plan/{generation}", "", text)
        self.store.set("latest", str(generation))

    def _read(self, generation: int) -> Plan | None:
        if not self.store.check([f"plan/{generation}"]):
            return None
        content = json.loads(self.store.get(f"plan/{generation}"))
        self._seen_joins = content["joins"]
        return Plan(generation, tuple(content["members"]), content["said"])

    def _enter(self, plan: Plan) -> Plan:
        """Start the generation's process group; everybody connects within `meeting` seconds."""
        self.plan = plan
        self.lost.clear()
        self._watch.follow(plan)
        store = dist.PrefixStore(f"{PREFIX}/group/{plan.generation}", self._connect())
        limit = timedelta(seconds=self.meeting)
        with self.connections.noting():
            dist.init_process_group(
                self.backend,
                store=store,
                rank=plan.members.index(self.uid),
                world_size=len(plan.members),
                timeout=limit,
            )
        group = dist.group.WORLD
        assert group is not None
        dist.barrier()
        compat.set_group_timeout(group, timedelta(seconds=self.timeout))
        return plan

    def leave(self) -> None:
        """End the process group without waiting for anybody."""
        self._watch.follow(None)
        self.connections.cut()
        if dist.is_initialized():
            dist.destroy_process_group()
        compat.forget_meshes()
        self.connections.forget()

    def finish(self) -> None:
        """The run is over, for all members at once."""
        self._watch.follow(None)
        self.store.set("done", "1")
        start.leave()
        self._watch.stop()

    def abandon(self) -> None:
        """Leave after an error, without waiting for anybody."""
        self.leave()
        self._watch.stop()

    # ---- the dead -----------------------------------------------------------------------------------------------

    def is_dead(self, uid: str) -> bool:
        """Whether somebody found this member dead."""
        return bool(self.store.check([f"dead/{uid}"]))

    def report_lost(self, generation: int) -> None:
        """Tell the members of a generation to meet again."""
        self.store.set(f"lost/{generation}", "1")

    def was_lost(self, patience: float) -> bool:
        """Whether an error was a member's loss: waits so long for somebody to find one dead."""
        return self.lost.wait(patience)


def report_dead(store: dist.Store, uid: str, reason: str) -> None:
    """Say that a member is dead, as its supervisor does when its process ends.

    The members of its generation look for this word themselves. A generation is not called lost here: by now the
    survivors may be in the next one, which this member is not in, and would leave it for nothing.
    """
    dist.PrefixStore(PREFIX, store).set(f"dead/{uid}", reason)


class Watch(threading.Thread):
    """Beats for this member, listens for the others, and ends waits when one is lost."""

    def __init__(self, membership: Membership, store: dist.Store) -> None:
        super().__init__(name="membership", daemon=True)
        self.membership, self.store = membership, store
        self.interval = min(0.05, membership.silence / 10)
        self._plan: Plan | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._heard: dict[str, tuple[bytes, float]] = {}

    def follow(self, plan: Plan | None) -> None:
        """Watch over the members of this generation; None: over nobody."""
        with self._lock:
            self._plan, self._heard = plan, {}

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        if self.is_alive():
            self.join(timeout=5.0)

    def run(self) -> None:
        """Until `stop`."""
        beats = 0
        while not self._over.wait(self.interval):
            beats += 1
            try:
                self.store.set(f"beat/{self.membership.uid}", str(beats))
                self._look()
            except Exception as error:  # the store is gone: the launcher is, and with it the job
                logger.warning("member %s no longer reaches the store: %s", self.membership.uid, error)
                return

    def _look(self) -> None:
        with self._lock:
            plan = self._plan
        if plan is None or self.membership.lost.is_set():
            return
        for uid in plan.members:
            dead = self.store.check([f"dead/{uid}"])
            if not dead and uid != self.membership.uid and self._silent(uid):
                self.store.set(f"dead/{uid}", f"no heartbeat for {self.membership.silence:.1f} s")
                dead = True
            if dead:
                self.store.set(f"lost/{plan.generation}", "1")
        if self.store.check([f"lost/{plan.generation}"]):
            with self._lock:
                if self._plan is plan:
                    self.membership.lost_since = time.monotonic()
                    self.membership.lost.set()
                    self.membership.connections.cut()

    def _silent(self, uid: str) -> bool:
        key, now = f"beat/{uid}", time.monotonic()
        beat = self.store.get(key) if self.store.check([key]) else b""
        last, since = self._heard.get(uid, (None, now))
        if beat != last:
            self._heard[uid] = (beat, now)
            return False
        return now - since > self.membership.silence
