"use strict";
// The form #filter, if there is one: a choice for each data attribute that a select is named for, and a text to find
// in the parts of a node that `texts` selects.
const filterBy = (nodes, texts) => {
  const form = document.getElementById("filter");
  if (!form) return;
  const selects = [...form.querySelectorAll("select")], input = form.querySelector("input"), output = form.querySelector("output");
  const all = [...document.querySelectorAll(nodes)].map(node => ({
    node, text: [...node.querySelectorAll(texts)].map(part => part.textContent).join("\n").toLowerCase(),
  }));
  for (const select of selects) {
    for (const value of new Set(all.map(one => one.node.dataset[select.name]))) select.add(new Option(value, value));
  }
  const filter = () => {
    const wanted = input.value.toLowerCase();
    let count = 0;
    for (const one of all) {
      const fits = selects.every(select => select.selectedIndex < 1 || one.node.dataset[select.name] === select.value)
        && one.text.includes(wanted);
      one.node.hidden = !fits;
      count += fits;
    }
    output.textContent = count + " of " + all.length + " shown";
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", event => event.preventDefault());
  form.hidden = all.length < 2;
  filter();
};
