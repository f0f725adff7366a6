"""The report's style sheet: system fonts, one column, light and dark; colours match `plots.LIGHT` and `plots.DARK`."""

CSS = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #ffffff; --ink: #1c2126; --muted: #5d6670; --line: #e1e3e6;
  --accent: #0b68ad; --good: #00714f; --bad: #b3430a; --s0: #0b68ad; --s1: #c4510c; --s2: #00805d; --s3: #a3508a;
  --s4: #8f6400; --s5: #4c5bb8; }
@media (prefers-color-scheme: dark) { :root { --page: #131619; --card: #1c2025; --ink: #e9ebee; --muted: #a0a9b3;
  --line: #31373e; --accent: #62b0ee; --good: #42c79d; --bad: #f28f55; --s0: #62b0ee; --s1: #f28f55; --s2: #42c79d;
  --s3: #e193c6; --s4: #ddb04c; --s5: #a0a9f5; }
  .table { --shade: #00000080; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55; font-size: 16px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 40px 20px 72px; }
header { margin-bottom: 26px; }
h1 { font-size: 1.85rem; line-height: 1.2; letter-spacing: -0.018em; margin: 0 0 6px; text-wrap: balance; }
h2 { font-size: 1.22rem; letter-spacing: -0.008em; margin: 52px 0 8px; scroll-margin-top: 12px; }
h3 { font-size: 1rem; margin: 26px 0 6px; }
p { margin: 0 0 12px; max-width: 74ch; }
.sub, figcaption, .small { color: var(--muted); font-size: 0.9rem; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 14px; font-size: 0.9rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 0.86em; }
.cards { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 12px; margin: 0 0 20px; }
.card, figure, .table, details, .verdicts { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.card { padding: 14px 16px 13px; display: flex; flex-direction: column; }
.card .name { color: var(--muted); font-size: 0.82rem; line-height: 1.3; }
.card .value { font-size: 1.72rem; font-weight: 640; letter-spacing: -0.02em; line-height: 1.25; margin: 3px 0 1px;
  font-variant-numeric: tabular-nums; }
.card .value .unit { font-size: 0.95rem; font-weight: 500; letter-spacing: 0; color: var(--muted); }
.card .more { color: var(--muted); font-size: 0.82rem; line-height: 1.4; }
.card.main .value { color: var(--accent); }
.verdicts { list-style: none; margin: 0; padding: 4px 20px; }
.verdicts li { padding: 11px 0 11px 14px; margin: 0; border-bottom: 1px solid var(--line); position: relative; }
.verdicts li:last-child { border-bottom: 0; }
.verdicts li::before { content: ""; position: absolute; left: 0; top: 14px; bottom: 14px; width: 3px;
  border-radius: 2px; background: var(--line); }
.verdicts li.good::before { background: var(--good); }
.verdicts li.bad::before { background: var(--bad); }
.verdicts li.even::before { background: var(--s4); }
.verdicts li.good b { color: var(--good); }
.verdicts li.bad b { color: var(--bad); }
.verdicts li:first-child { font-size: 1.06rem; }
.after { margin-top: 10px; }
figure { margin: 14px 0; padding: 16px 18px 12px; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin-top: 8px; max-width: 84ch; }
.table { overflow-x: auto; margin: 14px 0; --shade: #0000001f; background:
  linear-gradient(to left, var(--card) 40%, transparent) 100% 0 / 48px 100% no-repeat local,
  linear-gradient(to left, var(--shade), transparent) 100% 0 / 14px 100% no-repeat scroll, var(--card); }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { color: var(--muted); font-weight: 560; font-size: 0.8rem; vertical-align: bottom; line-height: 1.3;
  white-space: normal; }
tbody th { font-weight: 500; }
th:first-child, td.word, th.word { text-align: left; }
.points tr:not(.group) th:first-child { position: sticky; left: 0; background: var(--card); }
.stay { position: sticky; left: 10px; }
tbody tr:last-child > * { border-bottom: 0; }
tr.group > * { border-bottom: 0; padding-top: 13px; padding-bottom: 2px; }
tr.group th { font-weight: 640; }
.points tbody tr:not(.group) th { padding-left: 24px; }
.points thead th:first-child { padding-left: 10px; }
tr.chosen th, tr.chosen td { font-weight: 660; }
.dot { display: inline-block; width: 0.62em; height: 0.62em; border-radius: 50%; margin-right: 0.5em; }
.grids { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 12px; margin: 14px 0; }
.grids figure { margin: 0; padding: 10px 10px 8px; }
.grids figcaption { margin-top: 6px; line-height: 1.35; }
.grids b { color: var(--ink); }
.pixels { image-rendering: pixelated; }
details { margin: 14px 0; padding: 0 18px; }
summary { cursor: pointer; padding: 12px 0; font-weight: 560; }
details pre { overflow-x: auto; margin: 0 0 16px; line-height: 1.45; }
details .grids { margin-top: 0; margin-bottom: 18px; }
.facts th { font-weight: 500; color: var(--muted); vertical-align: top; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
@media (max-width: 760px) { .cards, .grids { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media (max-width: 640px) { body { font-size: 15px; }
  main { padding: 26px 14px 56px; } h1 { font-size: 1.5rem; } h2 { margin-top: 42px; }
  figure { padding: 12px 8px 10px; } figcaption { padding: 0 6px; } .card { padding: 12px 13px; }
  .card .value { font-size: 1.42rem; } .verdicts { padding: 2px 14px; } .grids figure { padding: 6px 6px 8px; } }
@media print { body { background: #fff; } figure, .card, tr { break-inside: avoid; } }
"""
