"""In which number formats a checkpoint is stored, from `quantization_config` and `torch_dtype` of its config."""

from __future__ import annotations

from typing import Any

import msgspec

from transload.errors import DeploymentError
from transload.hardware.config_keys import Keys
from transload.hardware.precision import DType, Precision, parse_dtype, with_weights


def read_precision(keys: Keys) -> tuple[Precision, list[str]]:
    """Formats by part, and remarks on what was taken for granted. Raises `DeploymentError`."""
    remarks: list[str] = []
    stated = keys.values.get("dtype") or keys.values.get("torch_dtype")
    if stated is None:
        remarks.append("the config states no dtype: counted as bfloat16")
    elif not isinstance(stated, str):
        raise DeploymentError(f"{keys.where}: torch_dtype is {stated!r}, wanted a name such as bfloat16")
    plain: DType = parse_dtype(stated) if isinstance(stated, str) else "bfloat16"
    cached: DType = "bfloat16" if plain == "float32" else plain
    precision = with_weights(Precision(kv=cached), plain)
    quantization = keys.values.get("quantization_config")
    if quantization is None:
        return precision, remarks
    if not isinstance(quantization, dict):
        raise DeploymentError(f"{keys.where}: quantization_config is {quantization!r}, wanted an object")
    weights = _weights(quantization, keys.where)
    if quantization.get("quant_method") == "mxfp4":  # as gpt-oss ships: only the experts
        precision = msgspec.structs.replace(precision, experts=weights)
    else:
        precision = with_weights(precision, weights)
    scheme = quantization.get("kv_cache_scheme") or quantization.get("kv_cache_quant_algo")
    if scheme is not None and scheme != "null":
        precision = msgspec.structs.replace(precision, kv="fp8")
    if quantization.get("modules_to_not_convert") or quantization.get("ignore"):
        remarks.append("single layers that its quantisation leaves out are counted as quantised")
    return precision, remarks


def _weights(quantization: dict[str, Any], where: str) -> DType:
    method = str(quantization.get("quant_method", "unstated")).replace("_", "-").lower()
    match method:
        case "fp8" | "fbgemm-fp8":
            return "fp8"
        case "mxfp4":
            return "mxfp4"
        case "gptq" | "awq" | "bitsandbytes":
            bits = quantization.get("bits") or (4 if quantization.get("load_in_4bit") else 8)
            return _by_bits(bits, "int", where)
        case "compressed-tensors":
            groups = quantization.get("config_groups")
            first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
            scheme = first.get("weights") if isinstance(first, dict) else None
            scheme = scheme if isinstance(scheme, dict) else {}
            return _by_bits(scheme.get("num_bits"), str(scheme.get("type", "int")), where)
        case "modelopt" | "modelopt-fp4":
            algorithm = str(quantization.get("quant_algo", "")).upper()
            if algorithm in ("FP8", "NVFP4"):
                return "fp8" if algorithm == "FP8" else "nvfp4"
    raise DeploymentError(
        f"{where}: quantization_config.quant_method is {method}, of which the number formats are not known here; "
        "known: fp8, fbgemm_fp8, mxfp4, gptq, awq, bitsandbytes, compressed-tensors, modelopt. "
        "Take the config of the plain model and say the format with --weights"
    )


def _by_bits(bits: object, kind: str, where: str) -> DType:
    formats: dict[tuple[object, str], DType] = {
        (4, "int"): "int4", (8, "int"): "int8", (8, "float"): "fp8", (4, "float"): "nvfp4",
    }  # fmt: skip
    if (bits, kind) not in formats:
        raise DeploymentError(f"{where}: quantization_config has {bits!r}-bit {kind} weights; known: 4 and 8 bits")
    return formats[bits, kind]
