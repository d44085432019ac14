"""One micro-step laid out: each visit of `steps`, with what ZeRO does for it and the copies to the host and back."""

from src.planner.cluster import Cluster
from src.planner.settings import Settings
from src.planner.steps import Visit, visits
from src.planner.streams import COMPUTE, EP, FROM_HOST, TO_HOST, Op, Schedule
from src.planner.zero import Zero


def micro_step(settings: Settings, cluster: Cluster, last: bool = True) -> Schedule:
    """Of one rank; `last` of its optimizer step, when an offloaded gradient crosses PCIe once more."""
    order, schedule = list(visits(settings, cluster)), Schedule()
    zero = Zero(settings, cluster, order, schedule, last)
    fetched: dict[str, int] = {}  # the copies that bring tensors back from the host, and exchanges beside computation
    for visit in order:
        if visit.backward and not schedule.forward_ops:
            schedule.forward_ops = len(schedule.ops)
        _visit(visit, schedule, zero, cluster, fetched)
    zero.flush()
    return schedule


def _visit(visit: Visit, schedule: Schedule, zero: Zero, cluster: Cluster, fetched: dict[str, int]) -> None:
    ledger = schedule.ledger
    ledger.now = visit.name
    for name, line in visit.takes.items():
        ledger.take(name, line)
    waits = (*zero.fetch(visit), *{fetched[name] for name in visit.awaits})
    if visit.during is not None:
        ledger.passing(visit.during)
    done = -1
    for part in visit.parts:
        seconds = part.seconds
        if part.stream == COMPUTE:  # casts and copies on other streams take the device's bandwidth: it lasts longer
            seconds += schedule.stolen
            schedule.paid, schedule.stolen = schedule.paid + schedule.stolen, 0.0
        elif seconds == 0.0:
            continue
        added = schedule.add(part._replace(seconds=seconds, name=f"{visit.name} {part.name}".rstrip(), after=waits))
        if part.stream == EP and visit.brings:
            fetched[visit.brings] = added
        else:
            done, waits = added, (added,)
    if visit.backward:
        zero.gradients(visit, done)
    zero.release(visit, done)
    if visit.syncs:
        schedule.host_works(0.0, done)
    for name, nbytes in visit.stows.items():
        schedule.add(Op(TO_HOST, nbytes / (cluster.pcie_out_gb_s * 1e9), name, (done,)))
    for name in visit.gives:
        ledger.give(name)
    for name, line in (*visit.leaves.items(), *visit.fetches.items()):
        ledger.take(name, line)
    if visit.fetches:
        nbytes = sum(line.nbytes for line in visit.fetches.values())
        what = f"{', '.join(visit.fetches)} from the host"
        copy = schedule.add(Op(FROM_HOST, nbytes / (cluster.pcie_in_gb_s * 1e9), what, (done,)))
        fetched |= dict.fromkeys(visit.fetches, copy)
