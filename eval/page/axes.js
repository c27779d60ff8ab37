// Scales, ticks, the Pareto front and places for labels: plain functions of numbers.

// Maps values onto pixels; padding: share of the range added at both ends.
function scale(values, log, from, to, padding) {
  const read = log ? Math.log10 : value => value;
  let low = Math.min(...values.map(read)), high = Math.max(...values.map(read));
  const more = Math.max(padding * (high - low), log ? 0.04 : 0.01 * Math.max(Math.abs(high), 1e-9));
  low -= more; high += more;
  const at = value => from + (read(value) - low) / (high - low) * (to - from);
  at.low = log ? 10 ** low : low;
  at.high = log ? 10 ** high : high;
  at.log = log;
  return at;
}

// Round numbers of a scale, about n of them.
function ticks(at, n) {
  const { low, high } = at, found = [];
  if (at.log && high / low > 4) {
    let best = [];
    for (const mantissas of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 6, 8]]) {
      const these = [];
      for (let decade = Math.floor(Math.log10(low)); decade <= Math.log10(high); decade++)
        for (const mantissa of mantissas) {
          const tick = mantissa * 10 ** decade;
          if (tick >= low && tick <= high) these.push(tick);
        }
      if (these.length > n + 2 && best.length) break;
      best = these;
      if (best.length >= n - 2) break;
    }
    return best;
  }
  const rough = (high - low) / n, decade = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map(mantissa => mantissa * decade).find(each => each >= rough * 0.999);
  for (let k = Math.ceil(low / step); k * step <= high; k++) found.push(+(k * step).toPrecision(12));
  return found;
}

// The points that no other is both cheaper and better than, cheapest first. sign: 1 where higher is better, else -1.
function front(points, sign) {
  const order = [...points].sort((a, b) => a.x - b.x || sign * (b.y - a.y)), best = [];
  for (const point of order) if (!best.length || sign * (point.y - best.at(-1).y) > 0) best.push(point);
  return best;
}

const overlap = (a, b) => Math.max(0, Math.min(a.right, b.right) - Math.max(a.left, b.left))
  * Math.max(0, Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top));
const around = (x, y, r) => ({ left: x - r, right: x + r, top: y - r, bottom: y + r });

// Boxes for labels that overlap neither points nor each other, near their points and over few lines; null: no room.
// anchors: {x, y, width}, most important first. lines: boxes that are better left free.
function placeLabels(anchors, height, bounds, points, lines) {
  const taken = points.map(point => around(point.x, point.y, 8)), directions = [0, 180, 90, 270, 45, 315, 135, 225, 20, 340, 160, 200];
  return anchors.map(({ x, y, width }) => {
    let best = null, least = Infinity;
    [11, 19, 32, 48].forEach((radius, ring) => directions.forEach((degrees, rank) => {
      const c = Math.cos(degrees * Math.PI / 180), s = Math.sin(degrees * Math.PI / 180);
      const side = value => Math.abs(value) < 1e-9 ? 0 : Math.sign(value);
      const cx = x + c * radius + side(c) * width / 2, cy = y + s * radius + side(s) * height / 2;
      const box = { left: cx - width / 2, right: cx + width / 2, top: cy - height / 2, bottom: cy + height / 2 };
      if (box.left < bounds.left || box.right > bounds.right || box.top < bounds.top || box.bottom > bounds.bottom) return;
      if (taken.some(other => overlap(box, other) > 0)) return;
      const cost = 30 * ring + 2 * rank + lines.reduce((sum, line) => sum + overlap(box, line), 0);
      if (cost < least) { least = cost; best = box; }
    }));
    if (best) taken.push({ left: best.left - 3, right: best.right + 3, top: best.top, bottom: best.bottom });
    return best;
  });
}
