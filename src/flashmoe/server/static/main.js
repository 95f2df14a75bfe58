// Reads the server's live frames and shows them, as long as the page is seen.

import { Figures } from "./figures.js";
import { HeatMap } from "./heatmap.js";
import { events, request } from "./server.js";

const calm = matchMedia("(prefers-reduced-motion: reduce)");
const RETRY = 2000; // milliseconds
const FIGURES_EVERY = 0.5; // seconds: digits that change faster cannot be read

const canvas = document.getElementById("map");
const status = document.getElementById("status");
let views = null;

function state(name, text) {
  status.dataset.state = name;
  if (status.textContent !== text) status.textContent = text;
}

function open(info) {
  document.getElementById("model").textContent = info.model;
  document.title = `${info.model} · FlashMoE`;
  return { figures: new Figures(info), map: new HeatMap(canvas, info), shown: 0 };
}

function show(frame) {
  const { figures, map } = views;
  figures.add(frame);
  map.add(frame.map);
  map.draw();
  if (frame.time - views.shown < FIGURES_EVERY) return;
  views.shown = frame.time;
  figures.show(frame);
  const { layers, experts } = figures.info;
  canvas.setAttribute("aria-label", `${map.resident} of ${layers * experts} experts are in memory`);
  state("live", frame.requests.running ? "generating" : "ready");
}

async function follow(signal) {
  views ??= open(await (await request("info", { signal })).json());
  const response = await request(`live/stream?hz=${calm.matches ? 2 : 10}`, { signal });
  for await (const data of events(response)) show(JSON.parse(data));
}

/** Resolves when the page is seen. */
function seen() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
}

for (;;) {
  await seen();
  const watching = new AbortController();
  const hide = () => document.hidden && watching.abort(); // a hidden page: the server need not note what is used
  document.addEventListener("visibilitychange", hide);
  try {
    await follow(watching.signal);
    throw new Error("the server has ended the stream");
  } catch {
    if (!watching.signal.aborted) {
      state("lost", "no connection");
      await new Promise((resolve) => setTimeout(resolve, RETRY));
    }
  }
  document.removeEventListener("visibilitychange", hide);
}
