"use strict";
// The pointer, a tap or the arrow keys show the numbers of a drawing's points; a click on the legend isolates a group.

const REACH = 24; // px from the pointer to a point
const tip = document.getElementById("tip");
let marked = [];
let alone = null; // the isolated group

function hide() {
  tip.hidden = true;
  marked.forEach((spot) => spot.classList.remove("on"));
  marked = [];
}

function show(text, box, spots = []) {
  hide();
  marked = spots;
  spots.forEach((spot) => spot.classList.add("on"));
  tip.textContent = text;
  tip.hidden = false;
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = `${scrollX + Math.max(8, Math.min(box.left + box.width / 2 + 10, room))}px`;
  tip.style.top = `${scrollY + (above > 4 ? above : box.bottom + 8)}px`;
}

function centre(spot) {
  const box = spot.getBoundingClientRect();
  return [box.left + box.width / 2, box.top + box.height / 2];
}

function distance(spot, x, y) {
  const box = spot.getBoundingClientRect();
  const aside = Math.max(box.left - x, 0, x - box.right);
  const away = Math.max(box.top - y, 0, y - box.bottom);
  const [cx, cy] = centre(spot);
  return aside || away ? 1000 + Math.hypot(aside, away) : Math.hypot(cx - x, cy - y);
}

const visible = (svg) => [...svg.querySelectorAll(".spot:not(.away)")];

function name(svg, spot) { // together with all points at the same place
  const [x, y] = centre(spot);
  const same = visible(svg).filter((other) => Math.hypot(centre(other)[0] - x, centre(other)[1] - y) < 3);
  show(same.map((other) => other.dataset.text).join("\n\n"), spot.getBoundingClientRect(), same);
}

function point(svg, event) {
  const near = visible(svg).map((spot) => [distance(spot, event.clientX, event.clientY), spot]);
  const [far, spot] = near.reduce((best, other) => (other[0] < best[0] ? other : best), [1000 + REACH, null]);
  if (spot && far < 1000 + REACH) name(svg, spot);
  else hide();
}

function walk(svg, event) { // arrow keys move from point to point
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const spots = visible(svg);
  if (event.key === "Escape") hide();
  if (!step || !spots.length || event.target !== svg) return;
  event.preventDefault();
  const at = spots.indexOf(marked[0]);
  const next = at < 0 ? (step > 0 ? 0 : spots.length - 1) : (at + step + spots.length) % spots.length;
  name(svg, spots[next]);
}

function value(image, event) { // the cell under the pointer, from the figure's table
  const table = image.closest("figure").querySelector("table");
  const heads = Number(table.dataset.heads);
  const box = image.getBoundingClientRect();
  const columns = [...table.tHead.rows[0].cells].slice(heads);
  const rows = [...table.tBodies[0].rows];
  const column = Math.floor(((event.clientX - box.left) / box.width) * columns.length);
  const row = rows[Math.floor(((event.clientY - box.top) / box.height) * rows.length)];
  if (!row || !columns[column]) return hide();
  const names = [...row.cells].slice(0, heads).map((cell) => cell.textContent);
  const content = row.cells[heads + column].textContent || "no value";
  const here = { left: event.clientX, right: event.clientX, width: 0, top: event.clientY - 8, bottom: event.clientY + 8 };
  show([...names, columns[column].textContent, content].join("\n"), here);
}

function isolate(group) {
  alone = alone === group ? null : group;
  hide();
  for (const svg of document.querySelectorAll("svg.drawing")) {
    const parts = [...svg.querySelectorAll("[data-group]")];
    const here = alone !== null && parts.some((part) => part.dataset.group === alone);
    for (const part of parts) part.classList.toggle("away", here && part.dataset.group !== alone);
    for (const key of svg.querySelectorAll(".key"))
      key.setAttribute("aria-pressed", String(key.dataset.group === alone));
  }
}

for (const svg of document.querySelectorAll("svg.drawing")) {
  const title = svg.closest("figure").querySelector("h3").textContent;
  const walks = visible(svg).length > 0;
  svg.setAttribute("role", walks ? "group" : "img");
  svg.setAttribute("aria-label", walks ? `${title}. Arrow keys move between its points.` : title);
  if (walks) svg.setAttribute("tabindex", "0");
  const image = svg.querySelector(".cells");
  for (const kind of ["pointermove", "pointerdown"]) {
    if (image) image.addEventListener(kind, (event) => value(image, event));
    else svg.addEventListener(kind, (event) => point(svg, event));
  }
  svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  svg.addEventListener("keydown", (event) => walk(svg, event));
  svg.addEventListener("blur", hide);
  for (const key of svg.querySelectorAll(".key")) {
    key.addEventListener("click", () => isolate(key.dataset.group));
    key.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      isolate(key.dataset.group);
    });
  }
}
document.addEventListener("pointerdown", (event) => event.target.closest("svg.drawing") || hide());
document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
