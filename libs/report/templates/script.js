document.documentElement.classList.add("js");
const place = document.getElementById("looks"), slider = document.getElementById("slider");
const looks = [...document.querySelectorAll(".look")].sort((a, b) => b.dataset.cost - a.dataset.cost);
const full = [...document.querySelectorAll("#reference img")];
let at = Math.max(0, looks.findIndex(look => look.dataset.chosen)), timer = null;

function own(look) { // the look's own images, after a flicker
  for (const image of look.querySelectorAll(".tiles img")) image.src = image.dataset.src || image.src;
}
function show(index) {
  own(looks[at]);
  at = index;
  place.replaceChildren(looks[at]);
  slider.querySelector("input").setAttribute("aria-valuetext", looks[at].dataset.name);
}
function flicker() {
  looks[at].querySelectorAll(".tiles img").forEach((image, i) => {
    image.dataset.src ||= image.src;
    if (full[i]) image.src = image.src === full[i].src ? image.dataset.src : full[i].src;
  });
}
if (looks.length > 1 || full.length) {
  const range = slider.querySelector("input"), button = slider.querySelector("button");
  range.max = looks.length - 1;
  range.value = at;
  range.oninput = () => show(+range.value);
  button.hidden = !full.length;
  button.onclick = () => {
    timer = timer ? clearInterval(timer) : setInterval(flicker, 500);
    button.setAttribute("aria-pressed", !!timer);
    own(looks[at]);
  };
  document.getElementById("others")?.remove();
  slider.hidden = !looks.length;
  if (looks.length) show(at);
}
for (const head of document.querySelectorAll(".sortable thead th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const up = head.getAttribute("aria-sort") === "descending";
  const key = row => column ? parseFloat(row.cells[column].dataset.value || "NaN") : row.cells[0].textContent;
  const order = (a, b) => isNaN(a) ? 1 : isNaN(b) ? -1 : a - b;
  const rows = [...body.rows].sort((a, b) => column ? order(key(a), key(b)) : key(a).localeCompare(key(b)));
  head.parentNode.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...(up ? rows : rows.reverse()));
};
