"use strict";
const page = JSON.parse(document.getElementById("data").textContent);
const sliders = [...document.querySelectorAll("input[type=range]")];
let parts;

// A plane of 16-bit numbers, base64, in units of its step.
function unpack({ numbers, step }) {
  const bytes = Uint8Array.from(atob(numbers), (letter) => letter.charCodeAt(0));
  return Float32Array.from(new Int16Array(bytes.buffer), (number) => number * step);
}

// Draw (3, size, size) in -1 to 1; what is beyond is clamped by the canvas.
function paint(canvas, values, gain = 1) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(page.size, page.size);
  const area = page.size * page.size;
  for (let at = 0; at < area; at++) {
    for (let channel = 0; channel < 3; channel++) {
      image.data[4 * at + channel] = (gain * values[channel * area + at] + 1) * 127.5;
    }
    image.data[4 * at + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

function sum(alphas) {
  const total = Float64Array.from(parts.R);
  parts.v.forEach((v, k) => {
    for (let at = 0; at < total.length; at++) total[at] += alphas[k] * v[at];
  });
  return total;
}

function show() {
  const alphas = sliders.map((slider) => Number(slider.value));
  const made = sum(alphas);
  const change = made.reduce((total, value, at) => total + Math.abs(value - parts.f[at]), 0) / made.length;
  const beyond = made.reduce((count, value) => count + (Math.abs(value) > 1), 0) / made.length;
  paint(document.getElementById("f"), made);
  sliders.forEach((slider, k) => { slider.nextElementSibling.textContent = alphas[k].toFixed(2); });
  document.getElementById("said").textContent =
    `Mean change from f: ${(127.5 * change).toFixed(1)} grey levels. ` +
    `Beyond the colour range: ${(100 * beyond).toFixed(1)} % of the values.`;
}

function load() {
  const chosen = page.images[document.querySelector("[name=image]:checked").value];
  const target = document.querySelector("[name=target]:checked").value;
  parts = { R: unpack(chosen.R), v: chosen.v[target].map(unpack) };
  parts.f = sum(sliders.map(() => 1));
  document.getElementById("x").src = chosen.x;
  paint(document.getElementById("R"), parts.R);
  parts.v.forEach((v, k) => paint(document.getElementById(`v${k + 1}`), v, page.gains[k]));
  show();
}

function set(value) {
  sliders.forEach((slider, k) => { slider.value = value(k); });
  show();
}

for (const choice of document.querySelectorAll("input[type=radio]")) {
  choice.addEventListener("change", () => {
    // Another image begins as the class that it is of.
    if (choice.name === "image") document.querySelectorAll("[name=target]")[page.images[choice.value].label].checked = true;
    load();
  });
}
for (const slider of sliders) slider.addEventListener("input", show);
document.querySelectorAll("[data-only]").forEach((button, only) => {
  button.addEventListener("click", () => set((k) => Number(k === only)));
});
for (const button of document.querySelectorAll("[data-all]")) {
  button.addEventListener("click", () => set(() => button.dataset.all));
}
load();
