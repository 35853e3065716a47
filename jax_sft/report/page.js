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
// In the tokens and the place: "trained" stands in every heading.
filterBy("article[data-source]", ".tokens, h3 > bdi");
