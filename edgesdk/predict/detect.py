"""Layer tables of well-known detectors: the YOLO families, SSDs and small mobile detectors."""

from __future__ import annotations

import re
from collections.abc import Callable

from edgesdk.predict import cnn
from edgesdk.predict.layers import Net

_ULTRA = {"n": (0.33, 0.25, 1024), "s": (0.33, 0.50, 1024), "m": (0.67, 0.75, 768), "l": (1.0, 1.0, 512), "x": (1.0, 1.25, 512)}
_ELEVEN = {"n": (0.5, 0.25, 1024), "s": (0.5, 0.50, 1024), "m": (0.5, 1.0, 512), "l": (1.0, 1.0, 512), "x": (1.0, 1.5, 512)}


def _ch(c: float, width: float, top: int) -> int:
    return int(-(-min(c, top) * width // 8) * 8)


def _bottleneck(n: Net, c: int, mid: int, act: int) -> Net:
    return n.conv(mid, 3).act(act).conv(c, 3).act(act).elem(2)


def _c2f(n: Net, out: int, reps: int, act: int) -> Net:
    """YOLOv8's block."""
    half = out // 2
    n.conv(out, 1).act(act).to(half)
    for _ in range(reps):
        _bottleneck(n, half, half, act)
    return n.to((2 + reps) * half).conv(out, 1).act(act)


def _c3k2(n: Net, out: int, reps: int, c3k: bool, e: float, act: int) -> Net:
    """YOLO11's block."""
    half = int(out * e)
    n.conv(2 * half, 1).act(act).to(half)
    for _ in range(reps):
        if c3k:
            inner = half // 2
            n.branch().conv(inner, 1).act(act)
            n.conv(inner, 1).act(act)
            for _ in range(2):
                _bottleneck(n, inner, inner, act)
            n.to(2 * inner).conv(half, 1).act(act)
        else:
            _bottleneck(n, half, half // 2, act)
    return n.to((2 + reps) * half).conv(out, 1).act(act)


def _c3(n: Net, out: int, reps: int, act: int) -> Net:
    """YOLOv5's block (also YOLOX's)."""
    half = out // 2
    n.branch().conv(half, 1).act(act)
    n.conv(half, 1).act(act)
    for _ in range(reps):
        n.conv(half, 1).act(act).conv(half, 3).act(act).elem(2)
    return n.to(out).conv(out, 1).act(act)


def _sppf(n: Net, out: int, act: int) -> Net:
    half = n.c // 2
    n.conv(half, 1).act(act).pool(5, 1).pool(5, 1).pool(5, 1).to(4 * half)
    return n.conv(out, 1).act(act)


def _psa(n: Net, reps: int, act: int) -> Net:
    """YOLO11's attention block over the coarsest map."""
    c, t = n.c, n.h * n.w
    half = c // 2
    n.conv(c, 1).act(act).to(half)
    heads = max(1, half // 64)
    for _ in range(reps):
        n.branch().conv(2 * half, 1)
        n.bmm(heads, t, 32, t).plain(float(heads * t * t), 2).bmm(heads, t, t, 64)
        n.dw(3).conv(half, 1).elem(2).conv(2 * half, 1).act(act).conv(half, 1).elem(2)
    return n.to(c).conv(c, 1).act(act)


def _head(n: Net, levels: list[Net], classes: int, act: int, light: bool) -> Net:
    """The decoupled head of YOLOv8 and YOLO11 (`light`: depthwise class branch)."""
    c2, c3 = max(16, levels[0].c // 4, 64), max(levels[0].c, min(classes, 100))
    anchors = 0
    for level in levels:
        level.branch().conv(c2, 3).act(act).conv(c2, 3).act(act).conv(64, 1)
        b = level.branch()
        if light:
            b.dw(3).act(act).conv(c3, 1).act(act).dw(3).act(act).conv(c3, 1).act(act)
        else:
            b.conv(c3, 3).act(act).conv(c3, 3).act(act)
        b.conv(classes, 1)
        anchors += level.h * level.w
    n.plain(64.0 * anchors, 2).plain(float(anchors * (classes + 4)), 2).plain(float(anchors * (classes + 4)), 2)
    return n


def yolov8(size: int = 640, kind: str = "n", classes: int = 80, act: int = 1, eleven: bool = False) -> Net:
    """Ultralytics YOLOv8 and YOLO11 detection, from the published scale tables."""
    depth, width, top = (_ELEVEN if eleven else _ULTRA)[kind]
    big = eleven and kind in "mlx"

    def reps(k: int) -> int:
        return max(1, round(k * depth))

    def ch(c: int) -> int:
        return _ch(c, width, top)

    def block(n: Net, c: int, k: int, deep: bool, e: float = 0.5) -> Net:
        return _c3k2(n, ch(c), reps(2), big or deep, e, act) if eleven else _c2f(n, ch(c), reps(k), act)

    n = Net(3, size, size).conv(ch(64), 3, 2).act(act).conv(ch(128), 3, 2).act(act)
    block(n, 256 if eleven else 128, 3, False, 0.25).conv(ch(256), 3, 2).act(act)
    p3 = block(n, 512 if eleven else 256, 6, False, 0.25).branch()
    n.conv(ch(512), 3, 2).act(act)
    p4 = block(n, 512, 6, True).branch()
    n.conv(ch(1024), 3, 2).act(act)
    _sppf(block(n, 1024, 3, True), ch(1024), act)
    if eleven:
        _psa(n, reps(2), act)
    p5 = n.branch()
    n.up().to(n.c + p4.c)
    u4 = block(n, 512, 3, False).branch()
    n.up().to(n.c + p3.c)
    l3 = block(n, 256, 3, False).branch()
    n.conv(ch(256), 3, 2).act(act).to(n.c + u4.c)
    l4 = block(n, 512, 3, False).branch()
    n.conv(ch(512), 3, 2).act(act).to(n.c + p5.c)
    l5 = block(n, 1024, 3, True).branch()
    return _head(n, [l3, l4, l5], classes, act, eleven)


def yolov5(size: int = 640, kind: str = "s", classes: int = 80, act: int = 1, x: bool = False) -> Net:
    """YOLOv5 v6 and, with `x`, YOLOX (arXiv 2107.08430) with its decoupled head."""
    depth, width, _ = _ULTRA[kind]

    def ch(c: int) -> int:
        return _ch(c, width, 1 << 20)

    def c3(n: Net, c: int, k: int) -> Net:
        return _c3(n, ch(c), max(1, round(k * depth)), act)

    n = Net(3, size, size)
    n = Net(12, size // 2, size // 2, n.layers).conv(ch(64), 3) if x else n.conv(ch(64), 6, 2)
    c3(n.act(act).conv(ch(128), 3, 2).act(act), 128, 3).conv(ch(256), 3, 2).act(act)
    p3 = c3(n, 256, 9 if x else 6).branch()
    p4 = c3(n.conv(ch(512), 3, 2).act(act), 512, 9).branch()
    _sppf(c3(n.conv(ch(1024), 3, 2).act(act), 1024, 3), ch(1024), act).conv(ch(512), 1).act(act)
    a5 = n.branch()
    n.up().to(n.c + p4.c)
    a4 = c3(n, 512, 3).conv(ch(256), 1).act(act).branch()
    n.up().to(n.c + p3.c)
    levels = [c3(n, 256, 3).branch()]
    n.conv(ch(256), 3, 2).act(act).to(n.c + a4.c)
    levels.append(c3(n, 512, 3).branch())
    n.conv(ch(512), 3, 2).act(act).to(n.c + a5.c)
    levels.append(c3(n, 1024, 3).branch())
    for level in levels:
        b = level.branch()
        if not x:
            b.conv(3 * (classes + 5), 1).act(3)
            continue
        b.conv(ch(256), 1).act(act)
        for _ in range(2):
            b.branch().conv(ch(256), 3).act(act).conv(ch(256), 3).act(act)
        b.branch().conv(classes, 1)
        b.conv(5, 1).act()
    return n


def yolov4_tiny(size: int = 416) -> Net:
    """YOLOv4-tiny (arXiv 2011.08036)."""
    n = Net(3, size, size).conv(32, 3, 2).conv(64, 3, 2)
    side = n
    for c in (64, 128, 256):
        n.conv(c, 3).to(c // 2).conv(c // 2, 3).conv(c // 2, 3).to(c).conv(c, 1)
        side = n.branch()
        n.to(2 * c).pool()
    n.conv(512, 3).conv(256, 1)
    n.branch().conv(512, 3).conv(255, 1)
    n.conv(128, 1).up().to(128 + side.c).conv(256, 3).conv(255, 1)
    return n


def yolov3_tiny(size: int = 416) -> Net:
    n = Net(3, size, size)
    for c in (16, 32, 64, 128, 256):
        n.conv(c, 3).pool()
    n.conv(512, 3).conv(1024, 3).conv(256, 1)
    n.branch().conv(512, 3).conv(255, 1)
    return n.conv(128, 1).up().to(384).conv(256, 3).conv(255, 1)


def _ssd_extra(n: Net, heads: list[Net], classes: int) -> Net:
    for mid, out in ((256, 512), (128, 256), (128, 256), (64, 128)):
        n.conv(mid, 1).conv(out, 3, 2)
        heads.append(n.branch())
    for i, h in enumerate(heads):
        boxes = 3 if i == 0 else 6
        h.branch().conv(boxes * 4, 1)
        h.branch().conv(boxes * classes, 1)
    return n.plain(2000.0 * classes, 2)


def mobilenet_ssd(size: int = 300) -> Net:
    """MobileNet v1 SSD, 21 classes, the Caffe network that ncnn measures."""
    n = Net(3, size, size).conv(32, 3, 2)
    for c, s in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5):
        n.dw(3, s).conv(c, 1)
    heads = [n.branch()]
    n.dw(3, 2).conv(1024, 1).dw().conv(1024, 1)
    heads.append(n.branch())
    return _ssd_extra(n, heads, 21)


def squeezenet_ssd(size: int = 300) -> Net:
    """SqueezeNet SSD, 21 classes, 3×3 heads on six scales (ncnn's benchmark/models/squeezenet_ssd_int8.param)."""
    n = cnn.squeezenet_body(Net(3, size, size))
    heads = [(Net(256, n.h * 2, n.w * 2, n.layers).elem(), 4), (n.branch(), 6)]  # the first scale is the fifth block's
    for _ in range(2):
        n.pool(3, 2).conv(96, 1)
        n.branch().conv(384, 1)
        heads.append((n.conv(384, 3).to(768).branch(), 6))
    for mid, out, boxes in ((128, 256, 6), (64, 128, 4)):
        n.conv(mid, 1).conv(out, 3, 2)
        heads.append((n.branch(), boxes))
    for h, boxes in heads:
        h.branch().conv(boxes * 4, 3).elem()
        h.branch().conv(boxes * 21, 3).elem()
    return n.plain(8030.0 * 21).plain(8030.0 * 25, 2, "elem")


def mobilenet_yolo(size: int = 416) -> Net:
    """MobileNet v1 YOLO, two scales (ncnn's benchmark/models/mobilenet_yolo.param)."""
    n = Net(3, size, size).conv(32, 3, 2)
    for c, s in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5):
        n.dw(3, s).conv(c, 1)
    side = n.branch()
    n.dw(3, 2).conv(1024, 1).dw().conv(1024, 1)
    n.branch().conv(125, 1)
    side.dw(4).elem(2).dw().conv(1024, 1).conv(125, 1)
    return n


def mobilenetv2_yolov3(size: int = 352) -> Net:
    """MobileNet v2 YOLOv3, two scales (ncnn's benchmark/models/mobilenetv2_yolov3.param)."""
    n = cnn.mobilenet_v2(size, top=False).conv(1280, 1).dw().conv(576, 1)
    n.branch().conv(75, 1)
    n.up().pool(2, 1)
    n.dw().conv(576, 1).elem(2).dw().conv(576, 1).conv(75, 1)
    return n


def nanodet(size: int = 320) -> Net:
    """NanoDet-m: ShuffleNet v2, a path aggregation network of 96 channels, light heads."""
    n = cnn.shufflenet_v2(size, top=False)
    for stride, cin in ((8, 116), (16, 232), (32, 464)):
        level = Net(cin, size // stride, size // stride, n.layers).conv(96, 1).elem(2, 2)
        for _ in range(2):
            level.dw().elem().conv(96, 1).elem()
        level.conv(112, 1)
    return n


def yolo_fastest(size: int = 320) -> Net:
    """YOLO-Fastest 1.1: very thin inverted residuals, two heads (about 0.25 GFLOPs at 320)."""
    n = Net(3, size, size).conv(8, 3, 2)
    rows = ((1, 4, 1, 1, 3), (6, 8, 3, 2, 3), (6, 16, 5, 2, 3), (6, 24, 4, 1, 3), (6, 40, 5, 2, 3), (6, 48, 5, 2, 3))
    cnn.inverted(n, [(float(t), c, r, s, k) for t, c, r, s, k in rows])
    n.conv(96, 1).dw(5).conv(128, 1).dw(5).conv(128, 1).conv(75, 1).up().to(136).conv(96, 1).dw(5).conv(96, 1).dw(5).conv(96, 1).conv(75, 1)
    return n


def fastest_v2(size: int = 352) -> Net:
    """YOLO-FastestV2 and FastestDet: ShuffleNet v2 0.5× and a light head."""
    n = cnn.shufflenet_v2(size, (48, 96, 192), top=False)
    for stride, cin in ((16, 96), (32, 192)):
        level = Net(cin, size // stride, size // stride, n.layers).conv(72, 1)
        level.dw(5).conv(72, 1).dw(5).conv(72, 1).dw(5).conv(72, 1).dw(5).conv(72, 1).conv(95, 1)
    return n


def blazeface(size: int = 128) -> Net:
    """BlazeFace (arXiv 1907.05047), front camera."""
    n = Net(3, size, size).conv(24, 5, 2)
    for c, s in (
        (24, 1),
        (28, 1),
        (32, 2),
        (36, 1),
        (42, 1),
        (48, 2),
        (56, 1),
        (64, 1),
        (72, 1),
        (80, 1),
        (88, 1),
        (96, 2),
        *((96, 1),) * 4,
    ):
        n.dw(3, s).conv(c, 1).elem(2)
    return n.conv(34, 1)


FIXED: dict[str, Callable[[int | None], Net]] = {
    "yolov4tiny": lambda s: yolov4_tiny(s or 416),
    "yolov3tiny": lambda s: yolov3_tiny(s or 416),
    "mobilenetssd": lambda s: mobilenet_ssd(s or 300),
    "squeezenetssd": lambda s: squeezenet_ssd(s or 300),
    "mobilenetyolo": lambda s: mobilenet_yolo(s or 416),
    "mobilenetv2yolov3": lambda s: mobilenetv2_yolov3(s or 352),
    "nanodetm": lambda s: nanodet(s or 320),
    "yolofastest": lambda s: yolo_fastest(s or 320),
    "yolofastestv2": lambda s: fastest_v2(s or 352),
    "fastestdet": lambda s: fastest_v2(s or 352),
    "blazeface": lambda s: blazeface(s or 128),
}


def detector(name: str, size: int | None) -> Net | None:
    """The table of a normalised name such as `yolov8n`, `yolo11x`, `yoloxs`; None when it is none of ours."""
    if name in FIXED:
        return FIXED[name](size)
    if m := re.fullmatch(r"yolov?8([nsmlx])?", name):
        return yolov8(size or 640, m[1] or "n")
    if m := re.fullmatch(r"yolov?(?:11|26)([nsmlx])?", name):
        return yolov8(size or 640, m[1] or "n", eleven=True)
    if m := re.fullmatch(r"yolov?5([nsmlx])?u?", name):
        return yolov5(size or 640, m[1] or "s")
    if m := re.fullmatch(r"yolox([nsmlx])?(leaky|relu)?", name):
        return yolov5(size or 640, m[1] or "s", act=0 if m[2] else 1, x=True)
    return None
