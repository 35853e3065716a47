// Everything is on the page without this: it adds the values under the pointer, or by the arrow keys, and a filter.
const tip = document.getElementById("tip");
const told = value => value === null ? "not finite" : String(Number(value.toPrecision(5)));
for (const figure of document.querySelectorAll("[data-plot]")) {
  const plot = JSON.parse(figure.dataset.plot), area = figure.querySelector(".area"), [low, high] = plot.x;
  const steps = [...new Set(plot.curves.flatMap(curve => curve.steps))].sort((a, b) => a - b);
  const cursor = document.createElement("div");
  cursor.className = "cursor";
  cursor.hidden = true;
  area.append(cursor);
  let at = -1;
  const hide = () => { at = -1; cursor.hidden = true; tip.style.display = "none"; };
  const show = index => {
    at = Math.max(0, Math.min(index, steps.length - 1));
    const step = steps[at], left = (step - low) / (high - low);
    const lines = plot.curves.flatMap(curve => {
      const i = curve.steps.indexOf(step);
      return i < 0 ? [] : [curve.name + ": " + told(curve.values[i])];
    });
    tip.textContent = ["step " + step.toLocaleString("en"), ...lines].join("\n");
    tip.style.display = "block";
    cursor.hidden = false;
    cursor.style.left = 100 * left + "%";
    const box = area.getBoundingClientRect(), x = box.left + left * box.width;
    const beside = x + 12 + tip.offsetWidth > innerWidth - 8 ? x - 12 - tip.offsetWidth : x + 12;
    tip.style.left = Math.max(8, beside) + "px";
    tip.style.top = Math.max(8, Math.min(box.top + 8, innerHeight - tip.offsetHeight - 8)) + "px";
  };
  const nearest = x => {
    let from = 0, to = steps.length - 1;
    while (to - from > 1) {
      const middle = (from + to) >> 1;
      if (steps[middle] < x) from = middle; else to = middle;
    }
    return x - steps[from] < steps[to] - x ? from : to;
  };
  const follow = event => {
    const box = area.getBoundingClientRect();
    show(nearest(low + (high - low) * (event.clientX - box.left) / box.width));
  };
  area.addEventListener("pointermove", follow);
  area.addEventListener("pointerdown", follow);
  area.addEventListener("pointerleave", hide);
  figure.addEventListener("blur", hide);
  figure.addEventListener("keydown", event => {
    const far = Math.max(1, Math.round(steps.length / 10));
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, PageUp: at - far, PageDown: at + far, Home: 0, End: steps.length - 1 }[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    show(to);
  });
}
filterBy(".pair", ".id, .text");
