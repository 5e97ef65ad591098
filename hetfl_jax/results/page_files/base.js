// What everything else uses: the data, small statistics, elements, numbers for people.

const DATA = JSON.parse(document.getElementById("data").textContent);
const DASHES = ["", "8 4", "8 3 2 3", "2 3"];
const COLORS = 8;
const MOST_KEYS = 5;
const MOST_LINES = COLORS * DASHES.length;
const ALL = " all";

/** An array of the data by its number. */
const pooled = (number) => (number === undefined || number === null ? [] : DATA.arrays[number]);

const present = (values) => values.filter((v) => v !== null && v !== undefined && !Number.isNaN(v));

const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

/** Sample deviation; of one value there is none. */
function deviation(values) {
  if (values.length < 2) return null;
  const middle = mean(values);
  return Math.sqrt(values.reduce((a, b) => a + (b - middle) ** 2, 0) / (values.length - 1));
}

/** Mean, deviation and number of the values that are there. */
function stats(values) {
  const there = present(values);
  return there.length ? { mean: mean(there), deviation: deviation(there), count: there.length } : null;
}

/** An element with attributes and children; text is text, never HTML. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "title", "desc", "rect", "circle", "g", "polyline"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
}

const fill = (id, ...children) => document.getElementById(id).replaceChildren(...children);

/** A number of a metric for people: shares in percent with two places, others with four digits. */
function written(value, share) {
  if (value === null || value === undefined || Number.isNaN(value)) return "-";
  return share ? `${(100 * value).toFixed(2)}%` : plainNumber(value);
}

/** Four digits, without zeros behind. */
function plainNumber(value) {
  if (value === null || value === undefined) return "-";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  return size >= 1e6 || size < 1e-3 ? value.toExponential(3) : String(Number(value.toPrecision(4)));
}

const megabytes = (value) => (value === null || value === undefined ? "-" : (value / 1e6).toFixed(2));
const giga = (value) => (value === null || value === undefined ? "-" : (value / 1e9).toPrecision(4));

/** Mean and deviation as one text. */
function spreadText(found, write) {
  if (!found) return "-";
  if (!found.deviation) return write(found.mean);
  return `${write(found.mean).replace("%", "")} \u00b1 ${write(found.deviation)}`;
}

/** The last part of a dotted key, of a name its block; all of it where two keys end alike. */
function shortKey(key) {
  const end = (k) => k.replace(/\.name$/, "").split(".").pop();
  return DATA.keys.filter((k) => end(k) === end(key)).length > 1 ? key : end(key);
}

const valueText = (value) => (value === null || value === undefined ? "-" : String(value));

/** Keys without the seed. */
const AXES = DATA.keys.filter((key) => key !== DATA.seed);

const valueOf = (point, key) => {
  const at = DATA.keys.indexOf(key);
  return at < 0 ? undefined : point.values[at];
};

const levelText = (level) => (DATA.levels[level] ? `${level} (${DATA.levels[level]})` : level);

/** Points of equal values but for the seed, in their order. */
function cells(points) {
  const found = new Map();
  for (const point of points) {
    const name = JSON.stringify(AXES.length ? AXES.map((key) => valueOf(point, key)) : DATA.keys.length ? [] : [point.name]);
    if (!found.has(name)) found.set(name, { values: AXES.map((key) => valueOf(point, key)), points: [] });
    found.get(name).points.push(point);
  }
  return [...found.values()];
}

/** Different values of a key among points, numbers in order. */
function valuesOf(points, key) {
  const found = [...new Map(points.map((p) => [JSON.stringify(valueOf(p, key)), valueOf(p, key)])).values()];
  return found.every((v) => typeof v === "number") ? found.sort((a, b) => a - b) : found;
}

/** Axes in which points differ. */
const varying = (points) => AXES.filter((key) => valuesOf(points, key).length > 1);

/** What a cell is called among those shown: by the keys that vary, or by its folder where these are many. */
function cellName(cell, axes) {
  const [first, ...more] = cell.points;
  if (!axes.length && more.length) return `${more.length + 1} seeds`;
  if (!axes.length || axes.length > MOST_KEYS) return more.length ? `${first.name} and ${more.length} more seeds` : first.name;
  return axes.map((key) => `${shortKey(key)} ${valueText(cell.values[AXES.indexOf(key)])}`).join(", ");
}

/** Points that count in means: the finished ones, if some are. */
function counted(points) {
  const done = points.filter((p) => p.status === "done");
  return done.length ? done : points;
}

const caption = (text) => make("caption", {}, make("span", {}, text));

const spaced = (name) => name.replaceAll("_", " ");

/** A metric of a point over its rounds, of a level where it has levels. */
function seriesOf(point, metric, level) {
  if (metric in point.scalars) return pooled(point.scalars[metric]);
  return pooled((point.series[metric] || {})[level]);
}

/** A metric of a point after its last round. */
function lastOf(point, metric, level) {
  const values = seriesOf(point, metric, level);
  return values.length ? values[values.length - 1] : null;
}

const hasLevels = (metric) => !DATA.points.some((p) => metric in p.scalars);
