"""How long live clients wait for the server's answers, with more and more of them.

    python tools/bench_serve.py BUNDLE SOUND_FILE [--clients 1 4 16 32] [--seconds 20] [--chunk-ms 640]

`asr serve` runs on the first core that this program may use, the clients on the last. Each of them speaks
Vosk's protocol: 100 ms of the file every 100 ms, from a place of its own, and an answer to each. Per number
of clients: the delays of the answers in milliseconds (median, 90, 95, 99 % and the largest), the share of the
core that the server used, and whether it kept up: whether every client, which waits for an answer before it
sends on, had sent all of its audio within a second of the time that it lasts. They begin one after the other,
within a second.
"""

import argparse
import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
from websockets.asyncio.client import connect

from asr.audio import Floats, read

RATE, BLOCK_S, LATE_S = 16000, 0.1, 1.0


async def speak(url: str, blocks: Sequence[bytes], start: float) -> tuple[list[float], float]:
    """(delay of each answer, how late the last block was sent), in seconds; the first is due at start."""
    delays, late_s = [], 0.0
    async with connect(url, compression=None, max_queue=1) as client:
        await client.send(f'{{"config": {{"sample_rate": {RATE}}}}}')
        for number, block in enumerate(blocks):
            due = start + number * BLOCK_S
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            late_s = time.monotonic() - due
            await client.send(block)
            await client.recv()
            delays.append(time.monotonic() - due)
        await client.send('{"eof": 1}')
        await client.recv()
    return delays, late_s


async def crowd(url: str, sound: Floats, num_clients: int, seconds: float) -> tuple[list[float], float]:
    """The delays of all clients, and how late the latest was."""
    size, count = round(RATE * BLOCK_S), round(seconds / BLOCK_S)
    pcm = np.round(sound * 32767).astype("<i2")
    start, talks = time.monotonic() + 1, []
    for n in range(num_clients):
        own = np.roll(pcm, -n * len(pcm) // num_clients)
        own = np.tile(own, -(-count * size // len(own)))[: count * size]
        blocks = [x.tobytes() for x in own.reshape(count, size)]
        talks.append(speak(url, blocks, start + n / num_clients))
    found = await asyncio.gather(*talks)
    return [delay for delays, _ in found for delay in delays], max(late for _, late in found)


def cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("sound")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--chunk-ms", type=int, default=0)
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "recipes.cli", "serve", args.bundle, "--port", "0"]
    command += ["--chunk-ms", str(args.chunk_ms), "--max-streams", str(max(args.clients))]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        os.sched_setaffinity(server.pid, cores[:1])
        os.sched_setaffinity(0, cores[-1:])
        assert server.stderr
        port = re.findall(r":(\d+), for", server.stderr.readline())[0]
        sound = read(args.sound, RATE)
        print("clients  median   90 %   95 %   99 %  largest   core  keeps up")
        for num_clients in args.clients:
            used_s, started = cpu_s(server.pid), time.monotonic()
            url = f"ws://127.0.0.1:{port}/vosk"
            delays, late_s = asyncio.run(crowd(url, sound, num_clients, args.seconds))
            share = (cpu_s(server.pid) - used_s) / (time.monotonic() - started - 1)
            times = "".join(f"{1000 * np.quantile(delays, q):7.0f}" for q in (0.5, 0.9, 0.95, 0.99, 1))
            keeps_up = "yes" if late_s < LATE_S else "no"
            print(f"{num_clients:7}{times}{100 * share:8.0f} %  {keeps_up}", flush=True)
    finally:
        server.terminate()
        server.communicate()


if __name__ == "__main__":
    main()
