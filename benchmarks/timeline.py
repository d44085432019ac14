"""Reads a step's trace of torch.profiler: what NCCL does, what hides it, what it takes from the products beside it."""

import statistics
from collections.abc import Sequence
from typing import Any

from src.rehearsal.timeline import DEVICE, merged, overlap, spans_of

ELEMENT = {"BFloat16": 2, "Half": 2, "Float": 4, "Double": 8, "Byte": 1, "Long": 8, "Int": 4, "Bool": 1}


def analyse(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One rank's step, ms.

    collectives: of each kind of NCCL's kernels, its stream, number, GB that its ranks hold together after (or, for a
    reduction, before) it, time, and the part of that beside no kernel of another kind. products_beside: time of a
    matrix product beside NCCL over the time of one of the same kernel and shapes alone, the mean over `products`.
    """
    device = [e for e in events if e.get("cat") in DEVICE and e.get("dur", 0) > 0]
    launches = {
        e["args"]["External id"]: e["args"]
        for e in events
        if e.get("cat") == "cpu_op" and "External id" in e.get("args", {})
    }
    nccl = [e for e in device if "nccl" in e["name"].lower()]
    compute = [e for e in device if e["cat"] == "kernel" and "nccl" not in e["name"].lower()]
    busy, talking = merged(spans_of(compute)), merged(spans_of(nccl))
    total = sum(b - a for a, b in talking)

    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for event in nccl:
        args = launches.get(event["args"].get("External id"), {}) | event["args"]
        name = args.get("Collective name") or event["name"].split("_")[2]
        elements = max(args.get("In msg nelems", 0), args.get("Out msg nelems", 0))
        event["gb"] = elements * ELEMENT.get(args.get("dtype", ""), 0) / 1e9
        key = f"{name} over {args.get('Group size', '?')}", str(event["args"].get("stream", "?"))
        kinds.setdefault(key, []).append(event)
    collectives = [
        {
            "name": name,
            "stream": stream,
            "kernels": len(chosen),
            "gb": sum(e["gb"] for e in chosen),
            "ms": sum(e["dur"] for e in chosen) / 1e3,
            "alone_ms": (sum(e["dur"] for e in chosen) - overlap(merged(spans_of(chosen)), busy)) / 1e3,
        }
        for (name, stream), chosen in kinds.items()
    ]

    beside: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for event in compute:
        shapes = str(launches.get(event["args"].get("External id"), {}).get("Input Dims", ""))
        if not any(word in event["name"].lower() for word in ("gemm", "nvjet")) or not shapes:
            continue
        shared = overlap([(event["ts"], event["ts"] + event["dur"])], talking) / event["dur"]
        if shared > 0.9 or shared == 0:
            beside.setdefault((event["name"], shapes), ([], []))[shared > 0.9].append(event["dur"])
    both = [(sum(b), statistics.mean(a) * len(b), len(b)) for a, b in beside.values() if a and b]
    return {
        "device_ms": (max(e["ts"] + e["dur"] for e in device) - min(e["ts"] for e in device)) / 1e3,
        "compute_ms": sum(b - a for a, b in busy) / 1e3,
        "nccl_ms": total / 1e3,
        "nccl_alone_ms": (total - overlap(talking, busy)) / 1e3,
        "collectives": sorted(collectives, key=lambda c: -c["ms"]),
        "products_beside": sum(b for b, _, _ in both) / sum(a for _, a, _ in both) if both else None,
        "products": sum(n for *_, n in both),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """`analyse`'s findings for a reader."""
    out = [
        f"on the device {found['device_ms']:.0f} ms, compute kernels in {found['compute_ms']:.0f} of them",
        f"NCCL {found['nccl_ms']:.1f} ms, of these beside no other kernel {found['nccl_alone_ms']:.1f}",
    ]
    out += [
        f"{c['name']}, stream {c['stream']}: {c['kernels']} kernels, {c['gb']:.2f} GB, {c['ms']:.1f} ms, "
        f"beside no other kernel {c['alone_ms']:.1f}"
        for c in found["collectives"]
    ]
    if found["products_beside"]:
        out.append(
            f"products beside NCCL: {found['products_beside']:.2f} x their time alone, {found['products']} of them"
        )
    return out
