"""From the names people use to what is meant: models, precisions and runtimes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from edgesdk.predict import cnn, sequence
from edgesdk.predict.cnn import CLASSIFIERS
from edgesdk.predict.detect import FIXED, detector
from edgesdk.predict.layers import Net

_ALIASES = {
    "mobilenet": "mobilenetv1", "mobilenetv3": "mobilenetv3large", "mobilenetv3l": "mobilenetv3large", "mobilenetv3s": "mobilenetv3small",
    "squeezenet11": "squeezenet", "squeezenetv11": "squeezenet", "squeezenet1": "squeezenet", "shufflenet": "shufflenetv1",
    "googlenetquantized": "googlenet",
    "efficientnet": "efficientnetb0", "inception": "inceptionv3", "wideresnet502": "wideresnet50", "resnext5032x4d": "resnext50",
    "resnext10132x8d": "resnext101", "resnet50v15": "resnet50", "mnasnet10": "mnasnet", "mnasnet1": "mnasnet", "regnet": "regnetx3200m",
    "regnetx32gf": "regnetx3200m", "regnety400mf": "regnety400m", "proxylessnas": "proxylessnasnet", "mobilenetv1ssd": "mobilenetssd",
    "ssdmobilenetv1": "mobilenetssd",
    "nanodet": "nanodetm", "densenet": "densenet121", "yolofastest11": "yolofastest", "yolofastestv11": "yolofastest",
    "shufflenetv2x10": "shufflenetv2",
    "shufflenetv205": "shufflenetv2x05", "convnext": "convnexttiny", "efficientnetv2": "efficientnetv2s", "vgg": "vgg16",
}  # fmt: skip
_TRANSFORMERS: dict[str, Callable[[], Net]] = {
    "visiontransformer": lambda: sequence.vit(384), "vit": sequence.vit, "vitb16": sequence.vit, "vitbase": sequence.vit,
    "vitb32": lambda: sequence.vit(224, 32), "vitl16": lambda: sequence.vit(224, 16, 1024, 24, 16),
    "deittiny": lambda: sequence.vit(d=192, heads=3), "deitsmall": lambda: sequence.vit(d=384, heads=6), "deitbase": sequence.vit,
    "swintiny": sequence.swin, "swinsmall": lambda: sequence.swin(depths=(2, 2, 18, 2)), "swinbase": lambda: sequence.swin(128, (2, 2,
    18, 2)),
    "distilbert": lambda: sequence.bert(384, depth=6, vocab=30522), "bert": lambda: sequence.bert(384, vocab=30522),
    "albert": lambda: sequence.bert(384, vocab=30000),
    "electra": lambda: sequence.bert(384), "mobilebert": sequence.mobilebert, "nomicembed": lambda: sequence.bert(128),
    "minilm": lambda: sequence.bert(128, 384, 6, 1536),
    "roberta": lambda: sequence.bert(384, vocab=50265),
}  # fmt: skip
_PREFIX = {
    "mobilebertuncased": "mobilebert", "distilbertbase": "distilbert", "bertbase": "bert", "albertbase": "albert", "electrabert": "electra",
    "nomicembedtext": "nomicembed", "robertabase": "roberta", "allminilml6": "minilm",
}  # fmt: skip


# Qualcomm's AI Hub takes torchvision's networks at 224 × 224 (qai_hub_models/models/*/info.yaml)
_HUB: dict[str, Callable[[int | None], Net]] = {
    "googlenet": lambda s: cnn.googlenet(s or 224, bn=True), "inceptionv3": lambda s: cnn.inception_v3(s or 224),
    "squeezenet": lambda s: cnn.squeezenet(s or 224), "alexnet": lambda s: cnn.alexnet(s or 224, grouped=False),
}  # fmt: skip


@cache
def cnn_or_transformer(name: str, hub: bool = False) -> Net | None:
    """The layer table of a single-pass model, or None. `hub`: as Qualcomm's AI Hub measures it."""
    return _resolve(name, hub)[1]


@cache
def canonical(name: str) -> str:
    """One name for all the spellings of a single-pass model; precisions share it."""
    return _resolve(name)[0]


def _resolve(name: str, hub: bool = False) -> tuple[str, Net | None]:
    text = name.lower()
    size = None
    if m := re.search(r"(?:[\s@(x]|^|_)(\d{3,4})(?:\s*x\s*\d{3,4})?\)?\s*$", text):
        size, text = int(m[1]), text[: m.start()]
    if "whisper" in text:
        kind = re.search(r"tiny|base|small|medium|turbo|large", text)
        if not kind:
            return text, None
        part = "decoder" if "decod" in text else "encoder"
        return f"whisper-{kind[0]}-{part}", sequence.whisper(kind[0], part == "decoder", 32 if part == "decoder" and ":" not in text else 1)
    key = re.sub(
        r"[^a-z0-9]", "", re.sub(r"(?:[_-]int8|[_-]fp16|[_-]fp32|[_-]quantized|-detection|_detection|[_-]det\b|[_-]cls\b)", "", text)
    )
    for prefix, target in _PREFIX.items():
        if key.startswith(prefix):
            key = target
    key = _ALIASES.get(key, key)
    if key in _TRANSFORMERS:
        return key, _TRANSFORMERS[key]()
    if hub and key in _HUB:
        return key, _HUB[key](size)
    if key in CLASSIFIERS:
        return key, CLASSIFIERS[key](size)
    key = (
        re.sub(r"^yolov?(\d+)([nsmlx]?)", lambda m: f"yolo{m[1]}{m[2] or ('s' if m[1] == '5' else 'n')}", key) if key not in FIXED else key
    )
    return f"{key}-{size}" if size not in (None, 640) else key, detector(key, size)


_FAMILIES = (
    (r"tinyllama", "tinyllama1.1b"), (r"llama.?v?-?2\D*13b", "llama2-13b"), (r"llama.?v?-?2\b(?!\.)\D*7b|llama-2-7b|llama 2 7b",
    "llama2-7b"),
    (r"llama.?v?-?3[.\d]*\W*70b", "llama3-70b"),
    (r"deepseek.*1[.]5b", "deepseekr1-1.5b"), (r"deepseek.*\b7b", "deepseekr1-7b"), (r"deepseek.*8b", "deepseekr1-8b"),
    (r"deepseek.*14b", "deepseekr1-14b"),
    (r"qwen.?3\D*(0[.]6|1[.]7|4|8)b", "qwen3-{}b"), (r"qwen.?2(?:[.]5)?(?:-coder)?\D*(0[.]5|1[.]5|3|7|14|32)b", "qwen2.5-{}b"),
    (r"qwen(?:1[.]5)?\D*(0[.]5|1[.]8|4|7)b", "qwen1.5-{}b"),
    (r"gemma.?3\D*(270m|1b|4b|12b)", "gemma3-{}"), (r"gemma.?2\W+(2b|9b)", "gemma2-{}"), (r"gemma\D*(2b|7b)", "gemma-{}"),
    (r"phi.?3|phi-3", "phi3-3.8b"), (r"phi.?4.?mini", "phi3-3.8b"), (r"phi.?4", "phi4-14b"), (r"phi", "phi2-2.7b"), (r"mistral",
    "mistral-7b"),
    (r"smollm2?[^\d]*(135m|360m|1[.]7b)", "smollm-{}"), (r"stablelm\D*(1[.]6b|3b)", "stablelm-{}"), (r"granite\D*[\d.]*\D*(2b|8b)",
    "granite3-{}"),
    (r"smollm2? \(size not stated", "smollm-1.7b"), (r"falcon.?3\D*1b", "falcon3-1b"), (r"orca.?mini", "orca-3b"),
    (r"llama.?v?-?3(?:[.]\d)?\D*?(8b)", "llama3-{}"), (r"llama.?v?-?3(?:[.]2)?\D*?(1b|3b)", "llama3.2-{}"), (r"vicuna\D*7b", "llama2-7b"),
)  # fmt: skip


@cache
def language(name: str) -> tuple[str, sequence.Language] | None:
    """The language model people call `name` (`llama3.2:3b`, `Llama 3.1 8B`), or None."""
    text = name.lower().replace("_", "-")
    for pattern, target in _FAMILIES:
        if m := re.search(pattern, text):
            key = target.format(*m.groups())
            if key in sequence.LANGUAGE:
                return key, sequence.LANGUAGE[key]
    return None


@dataclass(frozen=True)
class Precision:
    """`kind`: fp32, fp16, int8, w8a16, int4; bits a weight and an activation take in memory."""

    kind: str
    weight_bits: float
    act_bits: float


_GGML = {"q2": 3.35, "q3": 3.9, "q4_k": 4.85, "q4": 4.55, "q5": 5.6, "q6": 6.56, "q8": 8.5, "iq4": 4.5, "mxfp4": 4.3}


def precision(text: str, model: str) -> Precision:
    """The precision a row states, the model's own suffix included."""
    t = f"{text} {model}".lower()
    for key, bits in sorted(_GGML.items(), key=lambda kv: -len(kv[0])):
        if re.search(rf"\b{key}", t):
            return Precision("int8" if bits > 8 else "int4", bits, 8)
    if re.search(r"\b(w4|w4a16|8da4w|int4|4-?bit|spinquant|qlora|awq|gptq)", t) or "default quant" in t:
        return Precision("int4", 4.85 if "default" in t else 4.4, 16)
    if "w8a16" in t or "mixed_int16" in t:
        return Precision("w8a16", 8, 16)
    if re.search(r"int8|w8a8|8-?bit|quantized", t):
        return Precision("int8", 8, 8)
    if re.search(r"\b(f16|fp16|half|bf16)\b", text.lower()):
        return Precision("fp16", 16, 16)
    if re.search(r"fp32|f32", text.lower()) and "fp16" not in text.lower():
        return Precision("fp32", 32, 32)
    return Precision("fp", 16, 16)


@dataclass(frozen=True)
class Runtime:
    """`engine` shares efficiencies; `variant` is the program within it."""

    engine: str  # cpu, vulkan, gpu, npu
    variant: str


_NPU = {"precompiled_qnn_onnx": "onnx", "qnn_context_binary": "qnn_dlc", "qnn": "qnn_dlc", "ai hub": "onnx"}
_CPU = (
    ("torchscript", "torchscript"), ("pytorch", "pytorch"), ("onnx", "onnxruntime"), ("openvino", "openvino"), ("savedmodel",
    "tf-savedmodel"), ("graphdef", "tf-graphdef"),
    ("tflite|tf lite|litert", "tflite"), ("paddle", "paddle"), ("mnn", "mnn"), (r"benchncnn.*20[12]\d", "ncnn-2021"), ("benchncnn",
    "ncnn"), ("ncnn", "ncnn-ultralytics"),
    ("executorch|xnnpack", "xnnpack"), ("whisper", "whisper.cpp"),
    ("llamafile|sgemm", "llamafile"), ("ollama", "ollama"), ("llama[.]cpp|llama-bench", "llama.cpp"),
)  # fmt: skip


def runtime(
    text: str, device: str, note: str, quantized: bool, has_npu: bool, has_gpu: bool, old_npu: bool, attention: bool = False
) -> Runtime | None:
    """What a row's runtime runs on. `old_npu`: ONNX Runtime quantized programs fall back to the CPU there;
    with `attention` they fall back in part on every NPU."""
    t, n = text.lower(), note.lower()
    if "vulkan" in t or "vulkan" in device.lower():
        return Runtime("vulkan", "ncnn") if not quantized else Runtime("cpu", "ncnn")
    if "tensorrt" in t or "trt" in t:
        return Runtime("gpu", "tensorrt" + ("-ultralytics" if "ultralytics" in n else ""))
    if "mlc" in t:
        return Runtime("gpu", "mlc")
    if has_npu and ("primary compute unit cpu" in n or (t == "onnx" and quantized and old_npu)):
        return Runtime("ort", "ort-fallback")
    if has_npu and t == "onnx" and quantized and attention:
        return Runtime("ort", "ort-mixed")
    if has_npu and not re.search(r"ncnn|xnnpack|executorch|llama|mnn|ollama|cpu", t):
        for key in ("precompiled_qnn_onnx", "qnn_context_binary", "qnn_dlc", "genie", "tflite", "onnx", "ai hub", "qnn"):
            if key in t:
                return Runtime("npu", _NPU.get(key, key))
    if has_gpu and "cpu" not in device.lower() and re.search(r"pytorch|torchscript|cuda|onnx", t):
        return Runtime("gpu", "torch" if "torch" in t else "onnx-cuda")
    if has_gpu and "cpu" not in device.lower() and re.search(r"ollama|llama[.]cpp", t):
        return Runtime("gpu", "llama.cpp")
    for pattern, variant in _CPU:
        if re.search(pattern, t):
            return Runtime("cpu", variant)
    return None
