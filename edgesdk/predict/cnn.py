"""Layer tables of well-known image classifiers. The shapes are those of the papers named at each function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

from edgesdk.predict.layers import Net


def _round8(x: float, by: int = 8) -> int:
    """Channels rounded as MobileNet does."""
    n = max(by, int(x + by / 2) // by * by)
    return n + by if n < 0.9 * x else n


def resnet(blocks: Sequence[int], bottleneck: bool, size: int = 224, groups: int = 1, width: int = 64) -> Net:
    """ResNet (arXiv 1512.03385, with torchvision's stride in the 3×3), ResNeXt and Wide ResNet."""
    n = Net(3, size, size).conv(64, 7, 2).pool(3, 2)
    for stage, count in enumerate(blocks):
        base = 64 << stage
        mid = base * width * groups // 64 if bottleneck else base
        out = base * 4 if bottleneck else base
        for i in range(count):
            s = 2 if stage and i == 0 else 1
            if n.c != out or s > 1:
                n.branch().conv(out, 1, s)
            if bottleneck:
                n.conv(mid, 1).conv(mid, 3, s, groups=groups).conv(out, 1)
            else:
                n.conv(out, 3, s).conv(out, 3)
            n.elem(2)
    return n.gap().fc(1000)


def vgg(plan: Sequence[int], size: int = 224) -> Net:
    """VGG (arXiv 1409.1556); 0 is a pooling."""
    n = Net(3, size, size)
    for c in plan:
        n = n.conv(c, 3) if c else n.pool()
    return n.fc(4096).fc(4096).fc(1000)


def alexnet(size: int = 227, grouped: bool = True) -> Net:
    """AlexNet; `grouped` is the Caffe network that ncnn measures, else torchvision's."""
    g = 2 if grouped else 1
    a, b = (96, 256) if grouped else (64, 192)
    n = Net(3, size, size).conv(a, 11, 4, same=False).pool(3, 2, same=False).conv(b, 5, groups=g).pool(3, 2, same=False)
    n.conv(384, 3).conv(384 if grouped else 256, 3, groups=g).conv(256, 3, groups=g).pool(3, 2, same=False)
    return n.fc(4096).fc(4096).fc(1000)


def squeezenet_body(n: Net) -> Net:
    """SqueezeNet 1.1 (arXiv 1602.07360) without its classifier."""
    n.conv(64, 3, 2, same=False).pool(3, 2)
    for squeeze, out, pool in (
        (16, 64, 0),
        (16, 64, 1),
        (32, 128, 0),
        (32, 128, 1),
        (48, 192, 0),
        (48, 192, 0),
        (64, 256, 0),
        (64, 256, 0),
    ):
        n.conv(squeeze, 1)
        n.branch().conv(out, 1)
        n.conv(out, 3).to(2 * out)
        if pool:
            n.pool(3, 2)
    return n


def squeezenet(size: int = 227) -> Net:
    return squeezenet_body(Net(3, size, size)).conv(1000, 1).gap()


def mobilenet_v1(size: int = 224, alpha: float = 1.0, top: bool = True) -> Net:
    """MobileNet v1 (arXiv 1704.04861)."""
    n = Net(3, size, size).conv(_round8(32 * alpha), 3, 2)
    for c, s in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1)):
        n.dw(3, s).conv(_round8(c * alpha), 1)
    return n.gap().fc(1000) if top else n


def inverted(n: Net, rows: Sequence[tuple[float, int, int, int, int]], se: float = 0.0, act_free: int = 0) -> Net:
    """Rows (expansion, channels, repeats, stride, kernel) of inverted residuals; `se` is the squeeze share of the input channels;
    `act_free` element-wise operators follow each expanded tensor where the activation is not fused."""
    for t, c, reps, s, k in rows:
        for i in range(reps):
            cin, stride = n.c, s if i == 0 else 1
            if t != 1:
                n.conv(round(cin * t), 1).act(act_free)
            n.dw(k, stride).act(act_free)
            if se:
                n.se(max(1, int(cin * se)))
            n.conv(c, 1)
            if stride == 1 and cin == c:
                n.elem(2)
    return n


V2 = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3), (6, 96, 3, 1, 3), (6, 160, 3, 2, 3), (6, 320, 1, 1, 3))


def mobilenet_v2(size: int = 224, alpha: float = 1.0, top: bool = True) -> Net:
    """MobileNet v2 (arXiv 1801.04381)."""
    rows = [(float(t), _round8(c * alpha), r, s, k) for t, c, r, s, k in V2]
    n = inverted(Net(3, size, size).conv(_round8(32 * alpha), 3, 2), rows)
    return n.conv(max(1280, int(1280 * alpha)), 1).gap().fc(1000) if top else n


V3_LARGE = (
    (3, 16, 16, 0, 1, 0), (3, 64, 24, 0, 2, 0), (3, 72, 24, 0, 1, 0), (5, 72, 40, 1, 2, 0), (5, 120, 40, 1, 1, 0), (5, 120, 40, 1, 1, 0),
    (3, 240, 80, 0, 2, 1), (3, 200, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1), (3, 480, 112, 1, 1, 1), (3, 672, 112, 1,
    1, 1),
    (5, 672, 160, 1, 2, 1), (5, 960, 160, 1, 1, 1), (5, 960, 160, 1, 1, 1),
)  # fmt: skip
V3_SMALL = (
    (3, 16, 16, 1, 2, 0), (3, 72, 24, 0, 2, 0), (3, 88, 24, 0, 1, 0), (5, 96, 40, 1, 2, 1), (5, 240, 40, 1, 1, 1), (5, 240, 40, 1, 1, 1),
    (5, 120, 48, 1, 1, 1), (5, 144, 48, 1, 1, 1), (5, 288, 96, 1, 2, 1), (5, 576, 96, 1, 1, 1), (5, 576, 96, 1, 1, 1),
)  # fmt: skip


def mobilenet_v3(small: bool = False, size: int = 224) -> Net:
    """MobileNet v3 (arXiv 1905.02244): kernel, expanded, out, squeeze, stride, hard-swish."""
    n = Net(3, size, size).conv(16, 3, 2).act()
    for k, wide, out, squeeze, s, swish in V3_SMALL if small else V3_LARGE:
        cin = n.c
        if wide != cin:
            n.conv(wide, 1).act(swish)
        n.dw(k, s).act(swish)
        if squeeze:
            n.se(_round8(wide / 4))
        n.conv(out, 1)
        if s == 1 and cin == out:
            n.elem(2)
    n.conv(576 if small else 960, 1).act().gap()
    return n.fc(1024 if small else 1280).act().fc(1000)


def mnasnet(size: int = 224, alpha: float = 1.0) -> Net:
    """MnasNet-B1 (arXiv 1807.11626), torchvision's table."""
    n = Net(3, size, size).conv(_round8(32 * alpha), 3, 2).dw().conv(_round8(16 * alpha), 1)
    rows = ((3, 24, 3, 2, 3), (3, 40, 3, 2, 5), (6, 80, 3, 2, 5), (6, 96, 2, 1, 3), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))
    inverted(n, [(float(t), _round8(c * alpha), r, s, k) for t, c, r, s, k in rows])
    return n.conv(1280, 1).gap().fc(1000)


def proxylessnas(size: int = 224) -> Net:
    """ProxylessNAS mobile (arXiv 1812.00332), kernels and expansions approximated per stage."""
    n = Net(3, size, size).conv(32, 3, 2)
    inverted(
        n, ((1, 16, 1, 1, 3), (3, 32, 2, 2, 5), (3, 40, 4, 2, 5), (4, 80, 4, 2, 5), (3, 96, 4, 1, 5), (5, 192, 4, 2, 7), (6, 320, 1, 1, 7))
    )
    return n.conv(1280, 1).gap().fc(1000)


def efficientnet(width: float = 1.0, depth: float = 1.0, size: int = 224, lite: bool = False) -> Net:
    """EfficientNet (arXiv 1905.11946); `lite` has neither squeeze-and-excite nor swish."""
    n = Net(3, size, size).conv(32 if lite else _round8(32 * width), 3, 2).act(0 if lite else 1)
    rows = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))
    scaled = [(float(t), _round8(c * width), ceil(r * depth), s, k) for t, c, r, s, k in rows]
    inverted(n, scaled, se=0.0 if lite else 0.25, act_free=0 if lite else 1)
    return n.conv(1280 if lite else _round8(1280 * width), 1).act(0 if lite else 1).gap().fc(1000)


def efficientnet_v2(kind: str = "s", size: int = 384) -> Net:
    """EfficientNetV2 (arXiv 2104.00298): fused blocks first, then inverted residuals with squeeze-and-excite."""
    fused = {"b0": ((1, 16, 1, 1), (4, 32, 2, 2), (4, 48, 2, 2)), "s": ((1, 24, 2, 1), (4, 48, 4, 2), (4, 64, 4, 2))}[kind]
    rest = {
        "b0": ((4, 96, 3, 2, 3), (6, 112, 5, 1, 3), (6, 192, 8, 2, 3)),
        "s": ((4, 128, 6, 2, 3), (6, 160, 9, 1, 3), (6, 256, 15, 2, 3)),
    }[kind]
    n = Net(3, size, size).conv(32 if kind == "b0" else 24, 3, 2).act()
    for t, c, reps, s in fused:
        for i in range(reps):
            cin, stride = n.c, s if i == 0 else 1
            n.conv(cin * t if t > 1 else c, 3, stride).act()
            if t > 1:
                n.conv(c, 1)
            if stride == 1 and cin == c:
                n.elem(2)
    inverted(n, [(float(t), c, r, s, k) for t, c, r, s, k in rest], se=0.25, act_free=1)
    return n.conv(1280, 1).act().gap().fc(1000)


def shufflenet_v1(size: int = 224, groups: int = 3) -> Net:
    """ShuffleNet v1 1× (arXiv 1707.01083)."""
    n = Net(3, size, size).conv(24, 3, 2).pool(3, 2)
    for out, reps in ((240, 4), (480, 8), (960, 4)):
        for i in range(reps):
            s, cin = (2, n.c) if i == 0 else (1, n.c)
            n.conv(out // 4, 1, groups=1 if cin == 24 else groups).elem().dw(3, s)
            n.conv(out - cin if s == 2 else out, 1, groups=groups).to(out).elem(2)
    return n.gap().fc(1000)


def shufflenet_v2(size: int = 224, stages: Sequence[int] = (116, 232, 464), last: int = 1024, top: bool = True) -> Net:
    """ShuffleNet v2 (arXiv 1807.11164)."""
    n = Net(3, size, size).conv(24, 3, 2).pool(3, 2)
    for out, reps in zip(stages, (4, 8, 4), strict=True):
        half = out // 2
        n.branch().dw(3, 2).conv(half, 1)
        n.conv(half, 1).dw(3, 2).conv(half, 1).to(out).elem()
        for _ in range(reps - 1):
            n.to(half).conv(half, 1).dw().conv(half, 1).to(out).elem()
    return n.conv(last, 1).gap().fc(1000) if top else n


def regnet_y(widths: Sequence[int], depths: Sequence[int], group: int, size: int = 224, se: bool = True) -> Net:
    """RegNet X and Y (arXiv 2003.13678)."""
    n = Net(3, size, size).conv(32, 3, 2)
    for out, reps in zip(widths, depths, strict=True):
        for i in range(reps):
            cin, s = n.c, 2 if i == 0 else 1
            if i == 0:
                n.branch().conv(out, 1, s)
            n.conv(out, 1).conv(out, 3, s, groups=max(1, out // group))
            if se:
                n.se(max(1, cin // 4))
            n.conv(out, 1).elem(2)
    return n.gap().fc(1000)


def googlenet(size: int = 224, bn: bool = False) -> Net:
    """GoogLeNet (arXiv 1409.4842); `bn` is torchvision's, whose third branch is 3×3."""
    n = Net(3, size, size).conv(64, 7, 2).pool(3, 2).conv(64, 1).conv(192, 3).pool(3, 2)
    table = (
        (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), (), (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128,
        256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128), (), (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128),
    )  # fmt: skip
    for row in table:
        if not row:
            n.pool(3, 2)
            continue
        a, b1, b, c1, c, d = row
        n.branch().conv(a, 1)
        n.branch().conv(b1, 1).conv(b, 3)
        n.branch().conv(c1, 1).conv(c, 3 if bn else 5)
        n.branch().pool(3, 1).conv(d, 1)
        n.to(a + b + c + d)
    return n.gap().fc(1000)


def _inception_a(n: Net, pool: int) -> Net:
    n.branch().conv(64, 1)
    n.branch().conv(48, 1).conv(64, 5)
    n.branch().conv(64, 1).conv(96, 3).conv(96, 3)
    n.branch().pool(3, 1).conv(pool, 1)
    return n.to(224 + pool)


def _inception_c(n: Net, c: int) -> Net:
    n.branch().conv(192, 1)
    n.branch().conv(c, 1).conv(c, (1, 7)).conv(192, (7, 1))
    n.branch().conv(c, 1).conv(c, (7, 1)).conv(c, (1, 7)).conv(c, (7, 1)).conv(192, (1, 7))
    n.branch().pool(3, 1).conv(192, 1)
    return n.to(768)


def inception_v3(size: int = 299) -> Net:
    """Inception v3 (arXiv 1512.00567)."""
    n = Net(3, size, size).conv(32, 3, 2, same=False).conv(32, 3, same=False).conv(64, 3).pool(3, 2, same=False)
    n.conv(80, 1).conv(192, 3, same=False).pool(3, 2, same=False)
    for pool in (32, 64, 64):
        _inception_a(n, pool)
    b = n.branch().conv(384, 3, 2, same=False)
    n.branch().conv(64, 1).conv(96, 3).conv(96, 3, 2, same=False)
    n.to(768, b)
    for c in (128, 160, 160, 192):
        _inception_c(n, c)
    n.branch().conv(192, 1).conv(320, 3, 2, same=False)
    b = n.branch().conv(192, 1).conv(192, (1, 7)).conv(192, (7, 1)).conv(192, 3, 2, same=False)
    n.to(1280, b)
    for _ in range(2):
        n.branch().conv(320, 1)
        for first in (1, 3):
            m = n.branch().conv(384 if first == 1 else 448, 1)
            if first == 3:
                m.conv(384, 3)
            m.branch().conv(384, (1, 3))
            m.conv(384, (3, 1))
        n.branch().pool(3, 1).conv(192, 1)
        n.to(2048)
    return n.gap().fc(1000)


def densenet(blocks: Sequence[int], growth: int = 32, first: int = 64, size: int = 224) -> Net:
    """DenseNet (arXiv 1608.06993); its pre-activation norms are not foldable."""
    n = Net(3, size, size).conv(first, 7, 2).pool(3, 2)
    for b, reps in enumerate(blocks):
        for _ in range(reps):
            c = n.c
            n.elem().conv(4 * growth, 1).conv(growth, 3).to(c + growth)
        if b < len(blocks) - 1:
            n.elem().conv(n.c // 2, 1).pool()
    return n.elem().gap().fc(1000)


def convnext(depths: Sequence[int], dims: Sequence[int], size: int = 224) -> Net:
    """ConvNeXt (arXiv 2201.03545)."""
    n = Net(3, size, size)
    for i, (reps, d) in enumerate(zip(depths, dims, strict=True)):
        n.conv(d, 4 if i == 0 else 2, 4 if i == 0 else 2).act()
        for _ in range(reps):
            n.dw(7).act().conv(4 * d, 1).act().conv(d, 1).elem(2)
    return n.gap().fc(1000)


_A, _VGG16 = (
    (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0),
    (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0),
)
_VGG19 = (64, 64, 0, 128, 128, 0, *(256,) * 4, 0, *(512,) * 4, 0, *(512,) * 4, 0)
_EFF = (
    (1.0, 1.0, 224),
    (1.0, 1.1, 240),
    (1.1, 1.2, 260),
    (1.2, 1.4, 300),
    (1.4, 1.8, 380),
    (1.6, 2.2, 456),
    (1.8, 2.6, 528),
    (2.0, 3.1, 600),
)

_LITE = ((1.0, 1.0, 224), (1.0, 1.1, 240), (1.1, 1.2, 260), (1.2, 1.4, 280), (1.4, 1.8, 300))


def _scaled(width: float, depth: float, size: int, lite: bool) -> Callable[[int | None], Net]:
    return lambda s: efficientnet(width, depth, s or size, lite)


CLASSIFIERS: dict[str, Callable[[int | None], Net]] = {
    "resnet18": lambda s: resnet((2, 2, 2, 2), False, s or 224),
    "resnet34": lambda s: resnet((3, 4, 6, 3), False, s or 224),
    "resnet50": lambda s: resnet((3, 4, 6, 3), True, s or 224),
    "resnet101": lambda s: resnet((3, 4, 23, 3), True, s or 224),
    "resnet152": lambda s: resnet((3, 8, 36, 3), True, s or 224),
    "resnext50": lambda s: resnet((3, 4, 6, 3), True, s or 224, groups=32, width=4),
    "resnext101": lambda s: resnet((3, 4, 23, 3), True, s or 224, groups=32, width=8),
    "wideresnet50": lambda s: resnet((3, 4, 6, 3), True, s or 224, width=128),
    "vgg11": lambda s: vgg(_A, s or 224),
    "vgg16": lambda s: vgg(_VGG16, s or 224),
    "vgg19": lambda s: vgg(_VGG19, s or 224),
    "alexnet": lambda s: alexnet(s or 227),
    "squeezenet": lambda s: squeezenet(s or 227),
    "mobilenetv1": lambda s: mobilenet_v1(s or 224),
    "mobilenetv2": lambda s: mobilenet_v2(s or 224),
    "mobilenetv3large": lambda s: mobilenet_v3(False, s or 224),
    "mobilenetv3small": lambda s: mobilenet_v3(True, s or 224),
    "mnasnet": lambda s: mnasnet(s or 224),
    "mnasnet05": lambda s: mnasnet(s or 224, 0.5),
    "proxylessnasnet": lambda s: proxylessnas(s or 224),
    **{f"efficientnetb{i}": _scaled(w, d, z, False) for i, (w, d, z) in enumerate(_EFF)},
    **{f"efficientnetlite{i}": _scaled(w, d, z, True) for i, (w, d, z) in enumerate(_LITE)},
    "efficientnetv2b0": lambda s: efficientnet_v2("b0", s or 224),
    "efficientnetv2s": lambda s: efficientnet_v2("s", s or 384),
    "shufflenetv1": lambda s: shufflenet_v1(s or 224),
    "shufflenetv2": lambda s: shufflenet_v2(s or 224),
    "shufflenetv2x05": lambda s: shufflenet_v2(s or 224, (48, 96, 192)),
    "regnety400m": lambda s: regnet_y((48, 104, 208, 440), (1, 3, 6, 6), 8, s or 224),
    "regnety800m": lambda s: regnet_y((64, 144, 320, 784), (1, 3, 8, 2), 16, s or 224),
    "regnetx3200m": lambda s: regnet_y((96, 192, 432, 1008), (2, 6, 15, 2), 48, s or 224, se=False),
    "googlenet": lambda s: googlenet(s or 224),
    "inceptionv3": lambda s: inception_v3(s or 299),
    "densenet121": lambda s: densenet((6, 12, 24, 16), size=s or 224),
    "densenet169": lambda s: densenet((6, 12, 32, 32), size=s or 224),
    "convnexttiny": lambda s: convnext((3, 3, 9, 3), (96, 192, 384, 768), s or 224),
    "convnextsmall": lambda s: convnext((3, 3, 27, 3), (96, 192, 384, 768), s or 224),
    "convnextbase": lambda s: convnext((3, 3, 27, 3), (128, 256, 512, 1024), s or 224),
}
