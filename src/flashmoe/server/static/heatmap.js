// The map layers x experts on a canvas: one pixel per expert, drawn off screen and magnified.

const RESIDENT = 1, USED = 2, MISSED = 4;
const FADE = 0.78; // of a flash, from frame to frame
const FADE_MISSED = 0.6; // what a miss read is in memory, and that is what the map should show
const DIM = 0.02; // a flash that cannot be seen any more
const LEAST = 5; // CSS pixels of a cell; below, the map is turned

export class HeatMap {
  #canvas;
  #info;
  #cells; // bits of the last frame, [layers x experts]
  #glow; // what is left of each one's last flash, 0 to 1
  #red; // whether that was a miss
  #small = document.createElement("canvas");
  #colours;
  #dirty = true;

  constructor(canvas, info) {
    const n = info.layers * info.experts;
    this.#canvas = canvas;
    this.#info = info;
    this.#cells = new Uint8Array(n);
    this.#glow = new Float32Array(n);
    this.#red = new Uint8Array(n);
    new ResizeObserver(() => this.#fit()).observe(canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#fit());
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("pointerleave", () => { document.getElementById("cell").textContent = ""; });
    this.#fit();
  }

  /** Take a frame's map (base64). */
  add(map) {
    const cells = Uint8Array.from(atob(map), (c) => c.charCodeAt(0));
    for (let i = 0; i < cells.length; i++) {
      const lit = cells[i] & (USED | MISSED);
      if (lit) this.#red[i] = cells[i] & MISSED;
      const left = this.#glow[i] * (this.#red[i] ? FADE_MISSED : FADE);
      const glow = lit ? 1 : left < DIM ? 0 : left;
      this.#dirty ||= glow !== this.#glow[i] || cells[i] !== this.#cells[i];
      this.#glow[i] = glow;
    }
    this.#cells = cells;
  }

  /** Experts in memory. */
  get resident() {
    return this.#cells.reduce((sum, cell) => sum + (cell & RESIDENT), 0);
  }

  draw() {
    if (!this.#dirty) return;
    this.#dirty = false;
    const { layers, experts } = this.#info;
    const { cold, resident, used, missed } = this.#colours;
    const { width, height } = this.#small;
    const image = new ImageData(width, height);
    for (let layer = 0; layer < layers; layer++) {
      for (let expert = 0; expert < experts; expert++) {
        const i = layer * experts + expert;
        const at = 4 * (this.turned ? expert * width + layer : layer * width + expert);
        const ground = this.#cells[i] & RESIDENT ? resident : cold;
        const flash = this.#red[i] ? missed : used;
        for (let c = 0; c < 3; c++) image.data[at + c] = ground[c] + (flash[c] - ground[c]) * this.#glow[i];
        image.data[at + 3] = 255;
      }
    }
    this.#small.getContext("2d").putImageData(image, 0, 0);
    const draw = this.#canvas.getContext("2d");
    draw.imageSmoothingEnabled = false;
    draw.drawImage(this.#small, 0, 0, this.#canvas.width, this.#canvas.height);
    const [across, down] = [this.#canvas.width / width, this.#canvas.height / height];
    const gap = Math.min(across, down) >= 4 ? Math.max(1, Math.round(Math.min(across, down) / 8)) : 0;
    if (!gap) return;
    for (let x = 1; x <= width; x++) draw.clearRect(x * across - gap, 0, gap, this.#canvas.height);
    for (let y = 1; y <= height; y++) draw.clearRect(0, y * down - gap, this.#canvas.width, gap);
  }

  /** Size and colours, after the page's width or scheme has changed. */
  #fit() {
    const { layers, experts } = this.#info;
    const room = this.#canvas.parentElement.clientWidth;
    this.turned = room / experts < LEAST && layers < experts;
    const [columns, rows] = this.turned ? [layers, experts] : [experts, layers];
    const across = Math.max(1, Math.floor((room / columns) * devicePixelRatio)); // device pixels of a cell
    const most = ((this.turned ? 640 : 440) * devicePixelRatio) / rows;
    const down = Math.max(1, Math.floor(Math.min(most, Math.max(across, 22 * devicePixelRatio))));
    Object.assign(this.#small, { width: columns, height: rows });
    Object.assign(this.#canvas, { width: columns * across, height: rows * down });
    this.#canvas.style.width = `${(columns * across) / devicePixelRatio}px`;
    this.#canvas.style.height = `${(rows * down) / devicePixelRatio}px`;
    document.getElementById("map-axes").textContent = this.turned
      ? `${layers} layers across, ${experts} experts down`
      : `${layers} layers down, ${experts} experts across`;
    const style = getComputedStyle(this.#canvas);
    const colour = (name) => style.getPropertyValue(name).trim().match(/[0-9a-f]{2}/gi).map((hex) => parseInt(hex, 16));
    this.#colours = {
      cold: colour("--cold"), resident: colour("--resident"), used: colour("--used"), missed: colour("--miss"),
    };
    this.#dirty = true;
    this.draw();
  }

  #point(event) {
    const box = this.#canvas.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * this.#small.width);
    const y = Math.floor(((event.clientY - box.top) / box.height) * this.#small.height);
    const [layer, expert] = this.turned ? [x, y] : [y, x];
    const cell = this.#cells[layer * this.#info.experts + expert];
    if (cell === undefined) return;
    const where = cell & RESIDENT ? "in memory" : "on the drive";
    document.getElementById("cell").textContent =
      `block ${this.#info.first_moe_layer + layer}, expert ${expert}: ${where}`;
  }
}
