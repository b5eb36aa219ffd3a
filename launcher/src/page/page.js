'use strict';
(() => {
const data = JSON.parse(document.getElementById('data').textContent);
const runs = data.runs, many = runs.length > 1;
const main = document.querySelector('main');
const NS = 'http://www.w3.org/2000/svg';
const el = (tag, attrs = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [k, v] of Object.entries(attrs)) if (v !== undefined && v !== null) node.setAttribute(k, v);
  node.append(...children.filter(c => c !== undefined && c !== null));
  return node;
};
const svg = (tag, attrs = {}, text) => {
  const node = document.createElementNS(NS, tag);
  for (const [k, v] of Object.entries(attrs)) node.setAttribute(k, v);
  if (text !== undefined) node.textContent = text;
  return node;
};
const colour = i => `var(--c${i % 8})`;
const num = v => {
  if (v === null || v === undefined || Number.isNaN(v)) return '–';
  const a = Math.abs(v);
  if (a !== 0 && (a < 1e-3 || a >= 1e6)) return v.toExponential(2).replace(/\.?0+e/, 'e');
  return String(+v.toPrecision(a >= 100 ? 5 : 4));
};
const bytes = v => {
  if (v === null || v === undefined) return '–';
  for (const [u, s] of [['GiB', 2 ** 30], ['MiB', 2 ** 20], ['KiB', 1024]]) if (v >= s) return `${(v / s).toFixed(v / s >= 100 ? 0 : 1)} ${u}`;
  return `${v} B`;
};
const time = s => s >= 3600 ? `${(s / 3600).toFixed(1)} h` : s >= 60 ? `${(s / 60).toFixed(1)} min` : `${num(s)} s`;
const section = title => { const s = el('section', {}, el('h2', {}, title)); main.append(s); return s; };

const tip = el('div', { class: 'tip', role: 'status' });
document.body.append(tip);
const showTip = (event, head, rows) => {
  tip.replaceChildren(el('b', {}, head), ...rows.map(([c, name, value]) => {
    const label = el('span', {}, name);
    if (c) label.style.color = c;
    return el('div', {}, label, el('span', {}, value));
  }));
  tip.style.display = 'block';
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 6))}px`;
  tip.style.top = `${event.clientY + 18 + box.height > innerHeight ? Math.max(4, event.clientY - box.height - 12) : event.clientY + 18}px`;
};
const hideTip = () => { tip.style.display = 'none'; };

const ticks = (lo, hi, n) => {
  const span = hi - lo || 1, raw = span / n, mag = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * mag).find(s => span / s <= n) || mag * 10;
  const out = [];
  for (let v = Math.ceil(lo / step) * step; v <= hi + step * 1e-9; v += step) out.push(+v.toPrecision(12));
  return out;
};
// Ticks that are round in the unit that people read: GiB, minutes.
const unitTicks = (units, lo, hi, n) => {
  const unit = units.find(u => hi - lo >= u) || 1;
  return ticks(lo / unit, hi / unit, n).map(v => v * unit);
};
const byteTicks = (lo, hi, n) => unitTicks([2 ** 30, 2 ** 20, 1024], lo, hi, n);
const timeTicks = (lo, hi, n) => unitTicks([7200, 120], lo, hi, n);
const nearest = (xs, x) => {
  let lo = 0, hi = xs.length - 1;
  while (hi - lo > 1) { const mid = (lo + hi) >> 1; if (xs[mid] < x) lo = mid; else hi = mid; }
  return Math.abs(xs[lo] - x) <= Math.abs(xs[hi] - x) ? lo : hi;
};

// A chart: series = [{name, x, y, c, dash}]; stacked: areas on top of each other over one x.
function chart(into, title, series, opt = {}) {
  const H = opt.height || 220, L = 58, R = 14, T = 10, B = 26;
  let W = 420;
  const fmtX = opt.fmtX || num, fmtY = opt.fmtY || num;
  const hidden = new Set();
  const xs = series.flatMap(s => s.x);
  if (!xs.length) return;
  const full = [Math.min(...xs), Math.max(...xs)];
  if (full[0] === full[1]) full[1] = full[0] + 1;
  let view = [...full], log = false;
  const root = svg('svg', { height: H, role: 'img', 'aria-label': `${title}, ${series.length} series` });
  const legend = el('div', { class: 'legend' });
  const box = el('div', { class: 'card' }, el('h3', {}, title), root, legend);
  into.append(box);
  const px = x => L + (x - view[0]) / (view[1] - view[0]) * (W - L - R);
  const shown = () => series.filter(s => !hidden.has(s));
  let py = () => 0;
  function draw(select) {
    root.replaceChildren();
    const live = shown();
    const stacks = opt.stacked ? stack(live) : null;
    let lo = Infinity, hi = -Infinity;
    const see = v => { if (Number.isFinite(v) && (!log || v > 0)) { lo = Math.min(lo, v); hi = Math.max(hi, v); } };
    const inView = x => x >= view[0] && x <= view[1];
    if (stacks) { lo = 0; stacks.forEach(s => s.top.forEach((v, i) => inView(s.x[i]) && see(v))); if (opt.limit && view[0] === full[0] && view[1] === full[1] && opt.limit < hi * 4) see(opt.limit); }
    else live.forEach(s => s.y.forEach((v, i) => inView(s.x[i]) && see(v)));
    if (lo > hi) { lo = log ? 1 : 0; hi = lo + 1; }
    if (lo === hi) { const d = Math.abs(lo) * .1 || 1; lo -= d; hi += d; }
    const f = log ? Math.log10 : v => v, a = f(lo), b = f(hi) + (f(hi) - f(lo)) * .04;
    py = v => H - B - (f(v) - a) / (b - a) * (H - T - B);
    const yt = log ? ticks(a, b, 4).map(v => 10 ** v) : (opt.ticksY || ticks)(lo, hi, 4);
    yt.forEach(v => {
      root.append(svg('line', { x1: L, x2: W - R, y1: py(v), y2: py(v), stroke: 'var(--line)' }), svg('text', { x: L - 6, y: py(v) + 4, 'text-anchor': 'end' }, fmtY(v)));
    });
    (opt.ticksX || ticks)(view[0], view[1], Math.max(2, Math.round((W - L) / 90))).forEach(v => root.append(svg('text', { x: px(v), y: H - 8, 'text-anchor': px(v) > W - R - 20 ? 'end' : 'middle' }, fmtX(v))));
    const clip = `c${Math.random().toString(36).slice(2)}`;
    const cp = svg('clipPath', { id: clip });
    cp.append(svg('rect', { x: L, y: T, width: W - L - R, height: H - T - B }));
    const g = svg('g', { 'clip-path': `url(#${clip})` });
    root.append(cp, g);
    if (stacks) stacks.forEach(s => {
      const up = s.x.map((x, i) => `${px(x).toFixed(1)},${py(s.top[i]).toFixed(1)}`);
      const down = s.x.map((x, i) => `${px(x).toFixed(1)},${py(s.bottom[i]).toFixed(1)}`).reverse();
      g.append(svg('path', { d: `M${up.join('L')}L${down.join('L')}Z`, fill: s.c, 'fill-opacity': .75 }));
    });
    else live.forEach(s => {
      let d = '', pen = false;
      s.x.forEach((x, i) => {
        const v = s.y[i];
        if (!Number.isFinite(v) || (log && v <= 0)) { pen = false; return; }
        d += `${pen ? 'L' : 'M'}${px(x).toFixed(1)},${py(v).toFixed(1)}`; pen = true;
      });
      const finite = s.y.filter(Number.isFinite).length;
      g.append(svg('path', { d, fill: 'none', stroke: s.c, 'stroke-width': 1.6, 'stroke-dasharray': s.dash || '' }));
      if (finite <= 40) s.x.forEach((x, i) => Number.isFinite(s.y[i]) && g.append(svg('circle', { cx: px(x), cy: py(s.y[i]), r: 2.4, fill: s.c })));
    });
    if (opt.limit) {
      g.append(svg('line', { x1: L, x2: W - R, y1: py(opt.limit), y2: py(opt.limit), stroke: 'var(--bad)', 'stroke-dasharray': '5 4' }));
      if (py(opt.limit) > T + 2) g.append(svg('text', { x: W - R - 4, y: py(opt.limit) + 13, 'text-anchor': 'end' }, `budget ${fmtY(opt.limit)}`));
    }
    (opt.events || []).forEach(([x], i) => {
      if (!inView(x)) return;
      g.append(svg('line', { x1: px(x), x2: px(x), y1: T, y2: H - B, stroke: 'var(--fg)', 'stroke-opacity': .35 }), svg('text', { x: px(x) + 2, y: T + 10 }, String(i + 1)));
    });
    if (select) g.append(svg('rect', { x: Math.min(...select), y: T, width: Math.abs(select[1] - select[0]), height: H - T - B, fill: 'var(--c0)', 'fill-opacity': .18 }));
    root.append(svg('line', { id: 'cross', y1: T, y2: H - B, x1: -9, x2: -9, stroke: 'var(--dim)', 'stroke-dasharray': '2 3' }));
  }
  const at = e => { const r = root.getBoundingClientRect(); return (e.clientX - r.left) / r.width * W; };
  const value = x => view[0] + (x - L) / (W - L - R) * (view[1] - view[0]);
  let from = null;
  root.addEventListener('pointermove', e => {
    const x = Math.max(L, Math.min(W - R, at(e)));
    if (from !== null) { draw([from, x]); hideTip(); return; }
    const v = value(x), rows = [];
    let head = null;
    shown().forEach(s => {
      if (!s.x.length) return;
      const i = nearest(s.x, v);
      if (head === null) head = s.x[i];
      rows.push([s.c, s.name, fmtY(s.y[i])]);
    });
    (opt.events || []).forEach(([t, text], i) => { if (Math.abs(px(t) - x) < 6) rows.push([null, `${i + 1}. ${text}`, '']); });
    if (head === null) return;
    const cross = root.querySelector('#cross');
    cross.setAttribute('x1', px(head)); cross.setAttribute('x2', px(head));
    showTip(e, `${opt.xName || 'step'} ${fmtX(head)}`, rows.slice(0, 14));
  });
  root.addEventListener('pointerleave', () => { hideTip(); if (from === null) root.querySelector('#cross')?.setAttribute('x1', -9), root.querySelector('#cross')?.setAttribute('x2', -9); });
  root.addEventListener('pointerdown', e => { if (e.pointerType === 'mouse' && e.button === 0) { from = Math.max(L, Math.min(W - R, at(e))); root.setPointerCapture(e.pointerId); } });
  root.addEventListener('pointerup', e => {
    if (from === null) return;
    const to = Math.max(L, Math.min(W - R, at(e))), pair = [value(Math.min(from, to)), value(Math.max(from, to))];
    if (Math.abs(to - from) > 8) view = pair;
    from = null; draw();
  });
  root.addEventListener('dblclick', () => { view = [...full]; draw(); });
  if (series.length > 1 || opt.legend) series.forEach(s => {
    const mark = el('i'); mark.style.background = s.c;
    const button = el('button', { type: 'button', 'aria-pressed': 'true' }, mark, s.name);
    button.addEventListener('click', () => { hidden.has(s) ? hidden.delete(s) : hidden.add(s); button.setAttribute('aria-pressed', String(!hidden.has(s))); draw(); });
    legend.append(button);
  });
  if (!opt.stacked && series.some(s => { const p = s.y.filter(v => v > 0); return p.length > 1 && Math.max(...p) / Math.min(...p) > 50; })) {
    const button = el('button', { type: 'button', class: 'dim' }, 'log scale');
    button.addEventListener('click', () => { log = !log; button.textContent = log ? 'linear scale' : 'log scale'; draw(); });
    legend.append(button);
  }
  // Letters keep their size whatever the width.
  new ResizeObserver(() => {
    const width = Math.max(240, Math.round(root.clientWidth));
    if (width !== W) { W = width; root.setAttribute('viewBox', `0 0 ${W} ${H}`); draw(); }
  }).observe(root);
  root.setAttribute('viewBox', `0 0 ${W} ${H}`);
  draw();
}
function stack(series) {
  const base = new Array(series[0]?.x.length || 0).fill(0);
  return series.map(s => {
    const bottom = [...base];
    s.y.forEach((v, i) => { base[i] += v || 0; });
    return { x: s.x, c: s.c, top: [...base], bottom };
  });
}
function table(head, rows, numeric = []) {
  const cell = (tag, v, i) => { const td = el(tag, { class: numeric.includes(i) ? 'n' : null }); td.append(v instanceof Node ? v : String(v)); return td; };
  return el('div', { class: 'wide' }, el('table', {}, el('thead', {}, el('tr', {}, ...head.map((v, i) => cell('th', v, i)))), el('tbody', {}, ...rows.map(r => el('tr', {}, ...r.map((v, i) => cell('td', v, i)))))));
}

// Head.
main.append(el('h1', {}, data.title), el('p', { class: 'dim small' }, data.made));
if (many) {
  const s = section('Runs');
  s.append(table(['', ...runs.map(r => r.name)], data.facts.map(([k, ...v]) => [k, ...v])));
  if (data.differs.length) s.append(el('h3', { style: 'margin-top:18px' }, 'Config: what differs'), table(['key', ...runs.map(r => r.name)], data.differs));
  else s.append(el('p', { class: 'dim' }, 'Their configs are the same.'));
} else {
  const s = section('Run');
  s.append(el('div', { class: 'facts' }, ...data.facts.map(([k, v]) => el('div', { class: v.length > 36 ? 'long' : null }, el('span', {}, k), el('b', {}, v)))));
}

// Doctor.
{
  const s = section('Doctor');
  runs.forEach(r => {
    if (many) s.append(el('h3', {}, r.name));
    if (!r.findings.length) s.append(el('p', { class: 'ok' }, 'Nothing stands out.'));
    r.findings.forEach(f => s.append(el('div', { class: 'finding' }, el('b', {}, f.symptom), el('pre', { class: 'dim' }, f.cause), el('p', {}, f.change))));
  });
}

// Curves: a card per metric; val.x and train.x share one.
{
  const groups = new Map();
  runs.forEach((r, n) => r.curves.forEach(c => {
    const name = c.name.replace(/^(train|val)\./, '');
    if (!groups.has(name)) groups.set(name, []);
    const kind = c.name.startsWith('val.') ? 'val' : c.name.startsWith('train.') ? 'train' : null;
    groups.get(name).push({ run: n, kind, ...c });
  }));
  const s = section('Curves'), grid = el('div', { class: 'grid' });
  s.append(el('p', { class: 'dim small' }, 'Drag to zoom, double-click to see all, click a name to hide it.'), grid);
  for (const [name, list] of groups) {
    const series = list.map(c => ({
      name: [many ? runs[c.run].name : null, c.kind || (many ? null : name)].filter(Boolean).join(' '),
      x: c.x, y: c.y.map(v => v === null ? NaN : v),
      c: many ? colour(c.run) : colour(c.kind === 'val' ? 1 : c.kind === 'train' ? 2 : 0), dash: many && c.kind === 'val' ? '5 3' : '',
    }));
    chart(grid, name, series);
  }
}

// Memory.
if (runs.some(r => r.memory.x.length)) {
  const s = section('Memory'), grid = el('div', { class: many ? 'grid' : '' });
  s.append(grid);
  runs.forEach(r => {
    if (!r.memory.x.length) return;
    const series = r.memory.series.map((m, i) => ({ name: m.name, x: r.memory.x, y: m.y, c: colour(i) }));
    const title = `${many ? `${r.name}: ` : ''}this node's memory by part`;
    chart(grid, title, series, { stacked: true, limit: r.memory.budget, fmtY: bytes, ticksY: byteTicks, fmtX: time, ticksX: timeTicks, xName: 'after', events: r.events, legend: true, height: many ? 230 : 260 });
    if (!many && r.events.length) s.append(el('ol', { class: 'events' }, ...r.events.map(([t, text]) => el('li', {}, `${time(t)}: ${text}`))));
  });
  const g2 = el('div', { class: many ? 'grid' : '', style: 'margin-top:14px' });
  s.append(g2);
  runs.forEach(r => {
    if (!r.checks.length) return;
    const mark = c => el('span', { class: { true: 'ok', 'too small': 'bad', 'too large': 'warn' }[c.verdict] || 'dim' }, c.verdict);
    g2.append(el('div', { class: 'card' }, el('h3', {}, `${many ? `${r.name}: ` : ''}plan and truth`),
      table(['line', 'planned', 'measured', 'verdict'], r.checks.map(c => [c.name, bytes(c.planned), c.measured ? bytes(c.measured) : '–', mark(c)]), [1, 2])));
  });
}

// Pictures.
if (runs.some(r => r.pictures.length)) {
  const s = section('Pictures'), grid = el('div', { class: 'grid pictures' });
  s.append(grid);
  runs.forEach(r => r.pictures.forEach(p => grid.append(el('div', { class: 'card' }, el('h3', {}, `${many ? `${r.name}: ` : ''}${p.name}`), el('img', { src: p.src, alt: p.name, loading: 'lazy' })))));
}

// Config.
{
  const s = section('Config');
  runs.forEach(r => s.append(el('details', {}, el('summary', {}, `${r.name}: config.yaml`), el('pre', {}, r.config))));
}
})();
