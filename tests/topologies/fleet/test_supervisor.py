"""The supervisor, with processes of a simulated world."""

from typing import Any

import pytest

pytest.importorskip("ray")

from fleet_simulator import SimulatedProcess, World

from qfleet.config import RunFailed
from qfleet.topologies.fleet import channel, supervisor
from qfleet.topologies.fleet.calls import Inbox
from qfleet.topologies.fleet.ray_calls import RayCarrier
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote_process import InRemoteProcess, RemoteProcess
from qfleet.topologies.fleet.supervisor import Supervisor, carrier_of


class Worker(InRemoteProcess):
    """Does what it is asked for."""

    def work(self) -> int:
        return 1

    def work_on(self, value: Reference[int]) -> int:
        return value.value

    def make(self) -> Reference[int]:
        return Reference(7)


class Model:
    def __init__(self, *_: Any) -> None:
        pass

    work, work_on, make = Worker.work, Worker.work_on, Worker.make


def test_ray_carries_all_where_memory_cannot_be_shared(monkeypatch, caplog):
    """A small piece may be had where the whole can't, such as under a limit of the process's memory."""

    def too_much(*_: Any) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(supervisor, "can_share", lambda: True)
    monkeypatch.setattr(channel, "Arena", too_much)
    inbox = Inbox()
    assert isinstance(carrier_of(inbox, is_one_machine=True), RayCarrier)
    assert "can't share memory (Cannot allocate memory), so Ray carries all" in caplog.text
    inbox.close()


class Bench:
    """A supervisor with two processes in a world where nothing is left to chance."""

    def __init__(self, max_restarts: int = 5) -> None:
        self.world = World(0)
        self.world.models[Worker] = Model
        self.supervisor = Supervisor(silence_seconds=10.0, max_restarts=max_restarts)
        self.supervisor.open(self.world, self.world, self.world.clock)
        self.world.on_turn = self.supervisor.process_replies
        self.first, self.second = (self.add(name) for name in ("first", "second"))
        self.world.run_for(5.0)

    def add(self, name: str) -> RemoteProcess[Worker]:
        return self.supervisor.add(SimulatedProcess(self.world, name, Worker, (), {}, {}, lambda: None))

    def ask(self, method: Any, *arguments: Any) -> list[Any]:
        """Calls a method of the first process, and returns a list that its reply will be added to."""
        replies: list[Any] = []
        self.supervisor.submit(
            self.first, method, *arguments, on_reply=replies.append, on_dropped=lambda: replies.append("dropped")
        )
        return replies

    def seconds_until_replaced(self) -> float:
        """Returns after how many seconds the first process is replaced, which has fallen silent."""
        began = self.world.clock()
        self.world.run(lambda: self.supervisor.num_restarts > 0, 10_000, "a silent process is replaced")
        return self.world.clock() - began


@pytest.fixture
def bench() -> Bench:
    return Bench()


def has_worked(bench: Bench) -> None:
    replies = bench.ask(Worker.work)
    bench.world.run_for(5.0)
    assert replies == [1]


def test_a_call_of_a_process_that_has_nothing_to_do_is_sent_at_once(bench):
    """And not when the supervisor next deals with news, which a quiet run may have to wait for."""
    has_worked(bench)
    assert not bench.first.calls
    bench.ask(Worker.work)
    assert [call.is_sent for call in bench.first.calls] == [True]
    bench.ask(Worker.work_on, Reference())
    bench.ask(Worker.work)
    assert [call.is_sent for call in bench.first.calls] == [True, False, False], "calls keep their order"


def test_a_process_that_does_not_reply_is_replaced_later_if_it_has_to_compile(bench):
    bench.first.handle.is_stuck = True
    bench.ask(Worker.work)
    assert bench.seconds_until_replaced() == pytest.approx(51, abs=2)
    again = Bench()
    has_worked(again)
    again.first.handle.is_stuck = True
    again.ask(Worker.work)
    assert again.seconds_until_replaced() == pytest.approx(11, abs=2)


def test_a_process_that_hangs_while_its_object_is_made_is_replaced(bench):
    third = bench.add("third")
    bench.world.run(lambda: third.place is not None, 100, "the process says where it is")
    assert not third.is_ready
    third.handle.is_stuck = True
    assert bench.seconds_until_replaced() == pytest.approx(51, abs=2)
    bench.world.run(lambda: third.is_ready, 100, "its replacement is ready")
    assert len(third.failed_at) == 1


def test_a_process_that_waits_for_a_node_is_not_replaced(bench, caplog):
    bench.world.starved_until = bench.world.active + 1_000.0
    third = bench.add("third")
    bench.world.run_for(900.0)
    assert third.place is None and "third has waited" in caplog.text
    bench.world.run_for(200.0)
    assert third.is_ready and bench.supervisor.num_restarts == 0


def test_a_process_is_not_silent_while_it_waits_for_what_another_makes(bench):
    made = Reference()
    bench.supervisor.submit(bench.second, Worker.make, results=[made])
    bench.ask(Worker.work_on, made)
    has_worked(bench)
    made = Reference()
    bench.supervisor.submit(bench.second, Worker.make, results=[made])
    bench.second.handle.is_stuck = True  # it made it for the first time, so it isn't replaced before 50 s
    bench.second.has_replied_to.clear()
    bench.ask(Worker.work_on, made)
    assert bench.seconds_until_replaced() == pytest.approx(51, abs=2)
    assert not bench.first.failed_at and len(bench.second.failed_at) == 1


def test_time_in_which_nobody_listened_does_not_count(bench):
    has_worked(bench)
    bench.first.handle.is_stuck = True
    bench.ask(Worker.work)
    bench.world.after(5.0, lambda: bench.world.jump(60.0))
    assert bench.seconds_until_replaced() == pytest.approx(77, abs=3)


def test_nothing_is_dropped_before_submit_returns_and_no_call_is_sent_twice(bench):
    """A call that is dropped may have other calls made, of the same process too, and they keep their order."""
    never = Reference()
    bench.supervisor.submit(bench.second, Worker.make, results=[never])
    bench.second.handle.die()
    heard: list[str] = []

    def dropped() -> None:
        heard.append("dropped")
        bench.supervisor.submit(bench.first, Worker.work, on_reply=lambda _: heard.append("third"))

    bench.supervisor.submit(bench.first, Worker.work_on, never, on_dropped=dropped)
    bench.supervisor.submit(bench.first, Worker.work, on_reply=lambda _: heard.append("second"))
    never.is_lost = True
    bench.supervisor.submit(bench.first, Worker.work_on, never, on_dropped=lambda: heard.append("fourth"))
    assert heard == []
    bench.world.run_for(10.0)
    assert heard == ["dropped", "fourth", "second", "third"]


def test_a_process_that_has_ended_is_replaced_even_if_its_arguments_are_lost_too(bench):
    bench.world.is_one_machine = False
    made = Reference()
    bench.supervisor.submit(bench.second, Worker.make, results=[made])
    bench.world.run_for(5.0)
    bench.ask(Worker.work_on, made)
    bench.first.handle.die()
    made.place.is_lost = True
    bench.world.run_for(5.0)
    assert bench.supervisor.num_restarts == 1


def test_a_process_that_fails_too_often_ends_the_run():
    bench = Bench(max_restarts=0)
    bench.first.handle.die()
    with pytest.raises(RunFailed, match="first died; it has failed 1 times"):
        bench.world.run_for(5.0)
