"""The style sheet of the report: light and dark, from 360 pixels wide."""

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbf9;--card:#fff;--ink:#1c1d21;--soft:#62656d;--line:#e4e4de;
--a:#2a6fdb;--b:#d9622b;--c:#2c8a57;--good:#1d7a47;--bad:#b3361f;--tint:#f1f4fb;--code:#f4f4f0}
@media(prefers-color-scheme:dark){:root{--bg:#131417;--card:#1c1e22;--ink:#e8e8e4;--soft:#9a9da6;
--line:#31343a;--a:#7aaaf7;--b:#f0935f;--c:#6cc797;--good:#6cc797;--bad:#f28b76;--tint:#1d2430;
--code:#24262b}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif;overflow-wrap:anywhere}
main{max-width:1060px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:17px;margin:36px 0 12px}
h3{font-size:14px;margin:22px 0 8px;color:var(--soft);font-weight:600}
p{margin:0 0 8px}
.soft,small{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:20px}
.tile,.chart,.advice,.card{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:12px 14px}
.tile b{display:block;font-size:21px;font-weight:650;font-variant-numeric:tabular-nums;
line-height:1.3}
.tile span{color:var(--soft);font-size:13px}
.advice{background:var(--tint);margin:0;padding:14px 18px 14px 34px}
.advice li{margin:4px 0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,310px),1fr));gap:14px}
.chart{margin:0;padding:12px 12px 6px}
.chart figcaption{font-weight:600;font-size:14px;margin-bottom:6px}
.chart svg{display:block;width:100%;height:auto;font-size:10.5px}
.chart text{fill:var(--soft);font-variant-numeric:tabular-nums}
.chart path{fill:none;stroke-width:1.8;stroke-linejoin:round}
.chart .grid{stroke:var(--line);stroke-width:1}
path.c0{stroke:var(--a)}path.c1{stroke:var(--b)}path.c2{stroke:var(--c)}
circle.c0{fill:var(--a)}circle.c1{fill:var(--b)}circle.c2{fill:var(--c)}
.chart path.faint{stroke:var(--a);stroke-width:1;opacity:.35}
.key{font-weight:400;font-size:12px;color:var(--soft);margin-left:12px;white-space:nowrap}
.key::before{content:"";display:inline-block;width:14px;height:3px;border-radius:2px;
margin-right:5px;vertical-align:3px;background:var(--a)}
.key.c1::before{background:var(--b)}.key.c2::before{background:var(--c)}
.key.faint::before{background:var(--a);opacity:.35}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:right;padding:7px 14px;border-top:1px solid var(--line);vertical-align:top;
font-variant-numeric:tabular-nums}
.scroll table:not(.texts,.facts) td,th{white-space:nowrap;overflow-wrap:normal}
tr:first-child>*{border-top:0}
th{font-weight:600;color:var(--soft);font-size:13px}
.texts td{overflow-wrap:break-word}
th:first-child,td:first-child,.texts td,.texts th,.facts td{text-align:left}
.facts td:first-child{color:var(--soft);width:32%;min-width:110px}
.good{color:var(--good)}.bad{color:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:14px}
.cards.wide{grid-template-columns:1fr}
.card{padding:12px 14px}
.shots{display:grid;grid-template-columns:repeat(auto-fill,minmax(120px,1fr));gap:10px}
.shots figure{margin:0}
.shots img{display:block;width:100%;border-radius:6px;background:var(--line)}
.shots img.small{image-rendering:pixelated}
.shots figcaption{font-size:12px;color:var(--soft);margin-top:3px}
.card p{margin:10px 0 0;font-size:14px}
dl{margin:0}
dt{font-size:12px;color:var(--soft);margin-top:8px}
dt:first-child{margin-top:0}
dd{margin:0;white-space:pre-wrap}
dd.made{border-left:3px solid var(--a);padding-left:10px}
dd.was{border-left:3px solid var(--line);padding-left:10px}
.plain{display:block;max-width:100%;border-radius:8px;border:1px solid var(--line)}
pre{background:var(--code);border-radius:8px;padding:12px 14px;margin:0;white-space:pre-wrap;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre span{display:inline-block;max-width:100%;word-break:break-all}
details{margin-top:12px}
summary{cursor:pointer;color:var(--soft)}
footer{margin-top:40px;color:var(--soft);font-size:13px}
@media(max-width:520px){main{padding:20px 14px 40px}h1{font-size:22px}.tile b{font-size:17px}
.tiles{grid-template-columns:1fr 1fr;gap:8px}th,td{padding:6px 7px}
.scroll table:not(.texts,.facts){font-size:12.5px}
.scroll table:not(.texts,.facts) td:first-child{white-space:normal;overflow-wrap:anywhere}
.key{margin-left:8px}
.shots{grid-template-columns:repeat(auto-fill,minmax(90px,1fr))}}
"""
