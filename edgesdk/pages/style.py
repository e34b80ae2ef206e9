"""The look of a page: light and dark, from a phone's width to paper.

Colours of series are those of Okabe and Ito (jfly.uni-koeln.de/color), which the colour-blind can tell apart, darker on white and lighter on black
until they stand out 3:1; text stands out 4.5:1 (WCAG 2.1, 1.4.3 and 1.4.11).
"""

STYLE = """
:root{color-scheme:light dark;--page:#f4f5f7;--card:#fff;--ink:#1b1f24;--soft:#57606a;--rule:#d0d7de;--grid:#e6e9ed;
--c0:#0062ad;--c1:#b34e00;--c2:#007a5a;--c3:#a3367f;--c4:#6a5acd;--c5:#7a6200;
--good:#0a6b3d;--good-bg:#ddf4e4;--warn:#7a4d00;--warn-bg:#fdf0cd;--bad:#a4161a;--bad-bg:#fde3e3;--odd:#5b3fa8;--odd-bg:#ece6fb}
@media(prefers-color-scheme:dark){:root{--page:#0d1117;--card:#161b22;--ink:#e6edf3;--soft:#9aa6b2;--rule:#343c46;--grid:#262d36;
--c0:#62b0f5;--c1:#f0974a;--c2:#3fc79a;--c3:#e894c8;--c4:#a99bff;--c5:#dbc24a;
--good:#62d58f;--good-bg:#12351f;--warn:#f0c45a;--warn-bg:#3a2c08;--bad:#ff9492;--bad-bg:#451a1c;--odd:#c4b1ff;--odd-bg:#2a2150}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
main{max-width:1160px;margin:0 auto;padding:24px 20px 48px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}h2{font-size:19px;margin:32px 0 12px}h3{font-size:15px;margin:0 0 8px}
p{margin:4px 0}a{color:var(--c0)}
.soft,figcaption p,dt{color:var(--soft)}
.badge{display:inline-block;font-weight:600;border-radius:99px;padding:2px 12px}
.good{color:var(--good);background:var(--good-bg)}.warn{color:var(--warn);background:var(--warn-bg)}
.bad{color:var(--bad);background:var(--bad-bg)}.odd{color:var(--odd);background:var(--odd-bg)}
.card,figure{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:16px 18px;margin:0;min-width:0}
.card+.card{margin-top:16px}
.card ul{margin:8px 0 0;padding-left:20px}
.grid{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr))}
.tiles{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));margin:16px 0}
.tiles div{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:10px 14px}
.tiles b{display:block;font-size:21px;line-height:1.3;font-variant-numeric:tabular-nums}
.tiles span{font-size:13px;color:var(--soft);display:block;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 14px;margin:12px 0 0;font-size:14px}dd{margin:0;overflow-wrap:anywhere}
figure{display:flex;flex-direction:column}
figcaption h3{margin-bottom:0}figcaption p{font-size:13px}
.plot{margin:10px 0 8px}
svg{display:block;width:100%;height:auto;max-width:640px;margin:0 auto}
svg.narrow{display:none;max-width:400px}
svg text{font-size:12.5px;fill:var(--soft);font-family:inherit;paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
svg text.ink{fill:var(--ink)}svg text.strong{fill:var(--ink);font-weight:600}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}.thin{stroke-width:1.2}.dash{stroke-dasharray:5 4}.dot{stroke-width:0;fill-opacity:.65}
.axis{stroke:var(--soft);stroke-width:1}.tick{stroke:var(--grid);stroke-width:1}.ref{stroke:var(--ink);stroke-width:1.2;stroke-dasharray:3 3}
.zone{fill:var(--bad);fill-opacity:.16}.band{fill:var(--soft);fill-opacity:.14}.ring{fill:none;stroke:var(--ink);stroke-width:2}
.k0{stroke:var(--c0)}.k1{stroke:var(--c1)}.k2{stroke:var(--c2)}.k3{stroke:var(--c3)}.k4{stroke:var(--c4)}.k5{stroke:var(--c5)}
.f0{fill:var(--c0)}.f1{fill:var(--c1)}.f2{fill:var(--c2)}.f3{fill:var(--c3)}.f4{fill:var(--c4)}.f5{fill:var(--c5)}.fs{fill:var(--soft)}.ks{stroke:var(--soft)}
.faint{fill-opacity:.25;stroke:none}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;margin:2px 0 0;padding:0;list-style:none}
.legend li{display:flex;align-items:center;gap:6px;min-width:0;overflow-wrap:anywhere}.legend svg{width:22px;height:12px;flex:none;margin:0}
details{margin-top:auto;font-size:14px}summary{cursor:pointer;color:var(--soft);font-size:13px;padding:4px 0}
.scroll,.whole{overflow-x:auto;max-width:100%}.scroll{max-height:420px;overflow-y:auto}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums;min-width:50%}
th,td{padding:4px 14px 4px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}th{color:var(--soft);font-weight:600}
td.n,th.n{text-align:right;white-space:nowrap}
footer{margin-top:32px;font-size:13px;color:var(--soft)}
@media(max-width:599px){main{padding:16px 12px 32px}h1{font-size:21px}.card,figure{padding:12px}.tiles{grid-template-columns:repeat(2,minmax(0,1fr));gap:8px}
.tiles b{font-size:18px}
.tiles div:last-child:nth-child(odd){grid-column:1/-1}svg.wide{display:none}svg.narrow{display:block}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:6px}}
@media print{:root{color-scheme:light}body{background:#fff}main{max-width:none;padding:0}.grid{grid-template-columns:1fr 1fr}
figure,.card,.tiles div{break-inside:avoid}details:not([open]){display:none}.scroll{max-height:none;overflow:visible}}
"""
