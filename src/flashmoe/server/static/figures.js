// The tiles: tokens/s, hit rate, drive, memory, where a token's time goes, and hit rates that could have been.

import { Counters } from "./counters.js";

const GIB = 2 ** 30;
const WINDOW = 3; // seconds of a rate
const LONG = 20; // seconds of a share
const PARTS = 60;

const number = (value) => value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0);
const size = (bytes) => (bytes < GIB ? `${(bytes / 2 ** 20).toFixed(0)} MiB` : `${number(bytes / GIB)} GiB`);
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 || share > 0.995 ? 1 : 0)} %`;

function fill(tile, shares, label) {
  const bar = tile.querySelector(".bar");
  shares.forEach((share, i) => { bar.children[i].style.width = `${100 * Math.min(1, Math.max(0, share))}%`; });
  bar.setAttribute("aria-label", label);
}

function set(tile, value, note, unit) {
  tile.querySelector(".value").textContent = value;
  tile.querySelector(".note").textContent = note;
  if (unit) tile.querySelector(".unit").textContent = unit;
}

export class Figures {
  #counters = new Counters();
  #tiles = Object.fromEntries(
    ["speed", "hits", "drive", "memory", "time", "against"].map((id) => [id, document.getElementById(id)]),
  );

  constructor(info) {
    this.info = info;
  }

  add(frame) {
    this.#counters.add(frame);
  }

  show(frame) {
    this.#speed(frame);
    this.#hits(frame.prefetch, frame.approximate);
    this.#drive();
    this.#memory(frame.memory);
    this.#time();
    if (frame.compared) this.#against(frame.compared);
    if (frame.advice) this.#tiles.time.querySelector(".note").textContent = frame.advice.sentence;
    const { running, waiting } = frame.requests;
    document.getElementById("requests").textContent = `${running} running, ${waiting} waiting`;
  }

  // A rate is of evaluation time, so that it does not sink while a tile waits for the next request; then it is dimmed.
  #speed(frame) {
    const tile = this.#tiles.speed;
    const decode = this.#counters.over("decode", WINDOW);
    const prefill = this.#counters.over("prefill", WINDOW);
    tile.classList.toggle("stale", !decode.tokens);
    if (decode.seconds) tile.querySelector(".value").textContent = number(decode.tokens / decode.seconds);
    const note = tile.querySelector(".note");
    if (prefill.seconds) note.textContent = `prefill ${number(prefill.tokens / prefill.seconds)} tokens/s`;
    else if (frame.decode.tokens && !note.textContent.startsWith("prefill")) note.textContent = "";
    spark(tile.querySelector(".spark"), this.#counters.history(PARTS));
  }

  #hits(predictor, approximate) {
    const tile = this.#tiles.hits;
    const { hits, late_hits: late, misses, prefetch_hits: ahead } = this.#counters.over("decode", LONG);
    const all = hits + late + misses;
    tile.classList.toggle("stale", !all);
    if (!all) return;
    const parts = [hits - ahead, ahead, late, misses].map((count) => count / all);
    const label = `${percent(parts[0])} cached, ${percent(parts[1])} prefetched, ${percent(parts[2])} late, ` +
      `${percent(parts[3])} missed`;
    fill(tile, parts, label);
    const fetched = predictor ? `${percent(parts[1])} prefetched` : "no prefetching";
    const lossy = approximate && `approximate: ${percent(approximate.replaced_share)} replaced, ` +
      `${percent(approximate.dropped_share)} left out`;
    set(tile, ((100 * hits) / all).toFixed(1), lossy || fetched);
    tile.title = `${label}; policy ${this.info.policy}${predictor && `, predictor ${predictor}`}`;
  }

  #drive() {
    const tile = this.#tiles.drive;
    const ceiling = this.info.ceiling_bytes_per_second;
    const phases = ["prefill", "decode"].map((phase) => this.#counters.over(phase, WINDOW));
    const rate = phases[0].time && (phases[0].read_bytes + phases[1].read_bytes) / phases[0].time;
    tile.classList.toggle("stale", !rate);
    const note = ceiling ? `${percent(rate / ceiling)} of its ${number(ceiling / 1e9)} GB/s` : "ceiling not known";
    fill(tile, [ceiling ? rate / ceiling : 0], note);
    if (rate < 1e8) set(tile, number(rate / 1e6), note, "MB/s");
    else set(tile, number(rate / 1e9), note, "GB/s");
  }

  #memory({ resident_bytes: resident }) {
    const { budget_bytes: budget, slots, expert_bytes: expert } = this.info;
    const pool = Math.min(resident, slots * expert);
    const whole = Math.max(budget, resident);
    const note = budget ? `of ${size(budget)}; pool ${size(slots * expert)}` : `no budget; pool ${size(slots * expert)}`;
    fill(this.#tiles.memory, [pool / whole, (resident - pool) / whole], `${size(resident)} ${note}`);
    const [value, unit] = size(resident).split(" ");
    set(this.#tiles.memory, value, note, unit);
  }

  #time() {
    const tile = this.#tiles.time;
    const { tokens, seconds, stall_seconds: stall, overhead_seconds: python } = this.#counters.over("decode", LONG);
    tile.classList.toggle("stale", !tokens);
    if (!tokens || !seconds) return;
    const parts = { compute: Math.max(0, seconds - stall - python), stall, python };
    const label = [];
    for (const [name, part] of Object.entries(parts)) {
      const text = `${number((1000 * part) / tokens)} ms`;
      tile.querySelector(`.${name}`).textContent = text;
      label.push(`${name} ${text}`);
    }
    fill(tile, Object.values(parts).map((part) => part / seconds), label.join(", "));
  }

  #against({ tokens, seconds, hit_rate: cache, lru, belady }) {
    const tile = this.#tiles.against;
    const past = seconds < 90 ? `${seconds.toFixed(0)} s` : `${(seconds / 60).toFixed(0)} min`;
    tile.querySelector(".span").textContent = `· ${tokens} tokens, ${past}`;
    [lru, cache, belady].forEach((rate, i) => {
      const row = tile.querySelectorAll("li")[i];
      row.querySelector(".bar i").style.width = `${100 * rate}%`;
      row.querySelector("b").textContent = `${(100 * rate).toFixed(1)} %`;
    });
  }
}

/** Bars of a history, as high as the canvas for the highest. */
function spark(canvas, values) {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((n) => Math.round(n * devicePixelRatio));
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const draw = canvas.getContext("2d");
  const most = Math.max(...values) || 1;
  draw.clearRect(0, 0, width, height);
  draw.fillStyle = getComputedStyle(canvas).color;
  values.forEach((value, i) => {
    const high = Math.max(1, (value / most) * height);
    draw.fillRect((i * width) / values.length, height - high, Math.max(1, width / values.length - 1), high);
  });
}
