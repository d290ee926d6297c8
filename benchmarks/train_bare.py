"""The yardstick of benchmarks/train.py: the same model over the same batches in a plain PyTorch loop, without Ray.

    python benchmarks/train_bare.py EXPERIMENT.yaml INPUTS.safetensors WORKERS EPOCHS

INPUTS is what the train job counted before it started its workers. One process for one worker, DDP over gloo for more,
each on its own files of sequences, held in memory. Prints a JSON line. No checkpoints, no early stopping, no recovery.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))

import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from springtide.config import Settings, load_settings
from springtide.data.prepared import load_prepared
from springtide.training.job import sized
from springtide.training.loop import averaged, make_optimizer, update_average, validate
from springtide.training.sampling import sampling_of
from springtide.training.sequences import concatenate, epoch_batches, from_table, validation_cases
from springtide.training.worker import build_model


def train(rank: int, world: int, settings: Settings, inputs: Path, epochs: int) -> dict[str, list[float]]:
    """Seconds, CPU seconds and positions of each epoch of this process."""
    prepared = load_prepared(Path(settings.workspace))
    settings = sized(settings, prepared)
    config = settings.train
    torch.set_num_threads(config.threads_per_worker)
    sequences = concatenate([from_table(pq.read_table(f), 0.0) for f in prepared.sequence_files[rank::world]])
    cases = validation_cases(sequences, -(-config.validation_users // world))
    model, _ = build_model(settings, len(prepared.actions), inputs)
    optimizer = make_optimizer(model, config)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    sampling = sampling_of(settings.model, config, world)
    catalogue = len(model.item_vectors.known)
    negatives = config.negatives if catalogue > max(config.full_softmax_items, config.negatives) else 0
    average: dict[str, torch.Tensor] = {}
    record: dict[str, list[float]] = {"seconds": [], "cpu_seconds": [], "positions": []}
    for epoch in range(epochs):
        started, cpu, positions = time.perf_counter(), time.process_time(), 0
        seed = (config.seed, epoch, rank, 0)
        model.train()
        batches = list(epoch_batches(sequences, sampling, seed))
        steps = torch.tensor(len(batches))
        if world > 1:
            dist.all_reduce(steps, dist.ReduceOp.MIN)  # shares differ by a batch or two
        for batch in batches[: int(steps)]:
            loss, count = wrapped(batch, settings.data.exclude_seen, config.label_smoothing, negatives)
            optimizer.zero_grad(set_to_none=True)
            (loss / max(1, count)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            if config.average:
                update_average(average, model, config.average)
            positions += count
        with averaged(model, average):
            validate(model, cases, settings.data.exclude_seen, torch.device("cpu"))
        record["seconds"].append(time.perf_counter() - started)
        record["cpu_seconds"].append(time.process_time() - cpu)
        record["positions"].append(positions)
    return record


def worker(rank: int, world: int, port: int, arguments: list[str]) -> None:
    """One process; the first one prints the sums over all."""
    config, inputs, epochs = Path(arguments[0]), Path(arguments[1]), int(arguments[3])
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        dist.init_process_group("gloo", rank=rank, world_size=world)
    record = train(rank, world, load_settings(config), inputs, epochs)
    rest = slice(1, None) if epochs > 1 else slice(None)  # the first epoch warms up
    sums = torch.tensor([sum(record[key][rest]) for key in ("cpu_seconds", "positions")], dtype=torch.float64)
    if world > 1:
        dist.all_reduce(sums)
    seconds = sum(record["seconds"][rest])
    if rank == 0:
        cpu, positions = sums.tolist()
        print(json.dumps({"positions_per_cpu_second": positions / cpu, "positions_per_second": positions / seconds,
                          "epoch_seconds": seconds / max(1, epochs - 1), "epochs": record}))  # fmt: skip
    if world > 1:
        dist.destroy_process_group()


def main() -> None:
    world = int(sys.argv[3])
    if world == 1:
        worker(0, 1, 0, sys.argv[1:])
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, (world, port, sys.argv[1:]), nprocs=world)


if __name__ == "__main__":
    main()
