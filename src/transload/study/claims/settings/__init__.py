"""Which function simulates which claim. A claim that is not listed here is not checkable, and its record says why."""

from __future__ import annotations

from transload.study.claims.setting import Setting
from transload.study.claims.settings import experts, goodput, interference, single, split, sram, transfer

SETTINGS: dict[str, Setting] = {
    "haoai.2_30x": interference.any_inflation,
    "derived.2_30x.splitwise": interference.splitwise_inflation,
    "derived.2_30x.sarathi": interference.sarathi_hybrid,
    "derived.2_30x.distserve": interference.distserve_inflation,
    "sarathi.chunk_overhead": interference.sarathi_chunks,
    "splitwise.points": interference.splitwise_points,
    "deepseek.profile": experts.deepseek_profile,
    "lmsys.96h100": experts.lmsys_h100,
    "lmsys.gb200.2": experts.lmsys_gb200,
    "vllm.wideep_h200": experts.vllm_wide,
    "infx.r1_fp8_8k1k": experts.inferencex,
    "dynamo.30x": experts.dynamo,
    "h200.1.9x": single.h200,
    "distserve.kvtransfer": transfer.distserve_share,
    "hack.paper": transfer.hack_share,
    "3fs": transfer.three_fs,
    "cerebras.tps": sram.cerebras,
    "aws_cerebras": sram.aws_cerebras,
    "groq.v1": sram.groq,
    "sambanova.sn50": sram.sambanova,
    "step3": split.step3,
    "lpx.35x": split.lpx,
    "vllm.afd": split.ascend,
    "distserve.opt-13b.sharegpt": goodput.opt_13b,
    "distserve.opt-66b.sharegpt": goodput.opt_66b,
    "distserve.opt-175b.sharegpt": goodput.opt_175b,
    "distserve.ablation": goodput.ablation,
    "distserve.blog_toy": goodput.blog_toy,
    "distserve.sim_example": goodput.simulator_example,
    "hack.artifact": goodput.hack_artifact,
}
