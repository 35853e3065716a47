"use strict";
// Everything is on the page without this: it adds a tip over each token, and a filter.
const tip = document.getElementById("tip");
document.addEventListener("pointerover", event => {
  const token = event.target.closest("[data-i]");
  tip.style.display = token ? "block" : "none";
  if (!token) return;
  const usual = token.className.startsWith("t") ? "1" : "0";
  tip.textContent = "id " + token.dataset.i + ", weight " + (token.dataset.w || usual);
  const place = token.getClientRects()[0];
  const left = Math.min(place.left, innerWidth - tip.offsetWidth - 8);
  tip.style.left = Math.max(left, 8) + "px";
  tip.style.top = (place.top > 110 ? place.top - tip.offsetHeight - 6 : place.bottom + 6) + "px";
});
const form = document.getElementById("filter"), [select, input, output] = form.querySelectorAll("select, input, output");
// In the tokens and the place: "trained" stands in every heading.
const shown = [...document.querySelectorAll("article[data-source]")].map(node => ({
  node, source: node.dataset.source,
  text: [...node.querySelectorAll(".tokens, h3 > bdi")].map(part => part.textContent).join("\n").toLowerCase(),
}));
for (const source of new Set(shown.map(one => one.source))) select.add(new Option(source, source));
const filter = () => {
  const wanted = input.value.toLowerCase();
  let count = 0;
  for (const one of shown) {
    const fits = (select.selectedIndex < 1 || one.source === select.value) && one.text.includes(wanted);
    one.node.hidden = !fits;
    count += fits;
  }
  output.textContent = count + " of " + shown.length + " shown";
};
form.addEventListener("input", filter);
form.addEventListener("submit", event => event.preventDefault());
form.hidden = shown.length < 2;
filter();
