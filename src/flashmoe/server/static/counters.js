// Rates from counters: frames of the last minute, and differences between them.

const KEPT = 60;

export class Counters {
  #frames = [];

  add(frame) {
    const last = this.#frames.at(-1);
    if (last && (frame.decode.tokens < last.decode.tokens || frame.time < last.time)) this.#frames = []; // a new server
    this.#frames.push({ time: frame.time, prefill: frame.prefill, decode: frame.decode });
    while (frame.time - this.#frames[0].time > KEPT) this.#frames.shift();
  }

  /** What `phase` counted during the last `seconds`, with `time`, the seconds between the two frames. */
  over(phase, seconds) {
    const last = this.#frames.at(-1);
    const first = this.#frames.find((frame) => last.time - frame.time <= seconds);
    const difference = { time: last.time - first.time };
    for (const name in last[phase]) difference[name] = last[phase][name] - first[phase][name];
    return difference;
  }

  /** Tokens decoded per second, in `n` equal parts of the last minute, oldest first. */
  history(n) {
    const tokens = new Float64Array(n);
    const end = this.#frames.at(-1).time;
    for (let i = 1; i < this.#frames.length; i++) {
      const at = n - 1 - Math.floor(((end - this.#frames[i].time) / KEPT) * n);
      if (at >= 0) tokens[at] += this.#frames[i].decode.tokens - this.#frames[i - 1].decode.tokens;
    }
    return tokens.map((count) => (count * n) / KEPT);
  }
}
