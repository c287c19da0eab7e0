"""The look of report pages, light or dark as the reader's system is."""

STYLE = """
:root{--bg:#f7f6f3;--card:#fff;--ink:#1c2330;--soft:#667085;--line:#e6e3dc;--trough:#f0eee9;--accent:#2c62d6;
--wait:#e2843c;--compute:#3a74e0;--other:#b4bac6;--cold:#d8577a;--warm:#3a74e0;--io:#2a9d8f;--bad:#c93434;
--p0:#98a1b0;--p1:#57b0a6;--p2:#3a74e0;--p3:#e2843c;--p4:#8e6bd0;--p5:#5aa05a;--p6:#d9b23d;--p7:#cdd2da;
--p8:#c46a8b;--p9:#7d8a5c}
@media (prefers-color-scheme:dark){:root{--bg:#12151b;--card:#1a1f28;--ink:#e8eaef;--soft:#98a2b3;--line:#2b323e;
--trough:#232935;--accent:#82a9ff;--wait:#e8965a;--compute:#5f93f2;--other:#5b6473;--cold:#e77896;
--warm:#5f93f2;--io:#45b8a9;
--bad:#f07070;--p0:#6e7889;--p1:#57b0a6;--p2:#5f93f2;--p3:#e8965a;--p4:#a58be0;--p5:#74b874;--p6:#dcbc58;--p7:#444d5b;
--p8:#d588a4;--p9:#98a677}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:980px;margin:0 auto;padding:36px 20px 60px}
header{margin-bottom:22px}header p{margin:2px 0;color:var(--soft)}
h1{font-size:27px;line-height:1.25;margin:0 0 6px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:18px;margin:0 0 4px}
h3{font-size:13px;font-weight:600;color:var(--soft);margin:20px 0 6px}
.badge{display:inline-block;font-size:13px;font-weight:600;letter-spacing:0;vertical-align:middle;
border:1px solid var(--accent);color:var(--accent);border-radius:99px;padding:2px 10px;margin-left:6px}
.warning{background:var(--card);border-left:4px solid var(--wait);border-radius:6px;padding:8px 14px;margin:0 0 12px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(116px,1fr));gap:12px;margin:0 0 18px}
.tiles div,section{background:var(--card);border:1px solid var(--line);border-radius:12px}
.tiles div{padding:12px 14px}.tiles p{margin:0;font-size:12.5px;color:var(--soft)}
dt{font-size:12.5px;color:var(--soft)}
dd{margin:0;font-size:23px;font-weight:650;letter-spacing:-.01em;font-variant-numeric:tabular-nums;white-space:nowrap}
dd small{font-size:13px;font-weight:500;color:var(--soft);letter-spacing:0}
section{padding:18px 22px 20px;margin:0 0 18px}
.note{margin:0 0 10px;color:var(--soft)}
.legend{margin:8px 0 4px;font-size:13px;color:var(--soft)}.legend span{margin-right:18px;white-space:nowrap}
.key{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:7px}
svg{display:block;width:100%;height:auto;margin:6px 0}
svg text{font-size:12px;fill:var(--ink);font-variant-numeric:tabular-nums}
svg .axis,svg .figure{fill:var(--soft)}svg .end{text-anchor:end}svg .middle{text-anchor:middle}
svg .name{font-weight:600}svg .marked{font-size:11.5px;
paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
svg rect:hover{opacity:.8}
.grid{stroke:var(--line)}.mark{stroke:var(--ink);stroke-dasharray:4 3;opacity:.75}
.trough{fill:var(--trough)}
.wide{overflow-x:auto}
table{width:100%;border-collapse:collapse;margin-top:10px;font-size:13.5px;font-variant-numeric:tabular-nums}
th{font-weight:500;color:var(--soft);border-bottom:1px solid var(--line)}
th,td{padding:5px 10px;text-align:right;white-space:nowrap}.left{text-align:left}
th:first-child,td:first-child{padding-left:0}
tbody tr+tr td{border-top:1px solid var(--line)}
""" + "".join(
    f".{name}{{fill:var(--{colour});background:var(--{colour})}}"
    for name, colour in {
        **{name: name for name in ("wait", "compute", "other", "cold", "warm", "io")},
        "peak": "accent",
        "over": "bad",
        "trunk": "other",
        **{f"part{index}": f"p{index % 10}" for index in range(20)},
    }.items()
)
STYLE += ".line{fill:none;stroke-width:2.2;stroke-linejoin:round}" + "".join(
    f".line.{style}{{fill:none;stroke:var(--{colour})}}"
    for style, colour in {
        **{name: name for name in ("wait", "compute", "other", "warm")},
        **{f"part{index}": f"p{index % 10}" for index in range(20)},
    }.items()
)
