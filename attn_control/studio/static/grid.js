// One listener for the whole grid: it outlives every rendering of the buttons.
const buttons = () => [...element.querySelectorAll(".ac-grid button")];
const pressed = (button) => button.getAttribute("aria-pressed") === "true";
const heads = (layer) =>
  buttons().filter((b) => b.dataset.layer === layer && b.dataset.head !== undefined);

function tell() {
  const on = buttons().filter(pressed);
  const whole = !!element.querySelector(".ac-whole");
  const cells = on
    .filter((b) => whole || b.dataset.head !== undefined)
    .map((b) => (whole ? [Number(b.dataset.layer)] : [Number(b.dataset.layer), Number(b.dataset.head)]));
  props.value = element.querySelector(".ac-grid").parentElement.innerHTML;
  trigger("pick", { cells: cells });
}

element.addEventListener("click", (event) => {
  const button = event.target.closest(".ac-grid button");
  if (!button) return;
  const on = !pressed(button);
  button.setAttribute("aria-pressed", on);
  const row = heads(button.dataset.layer);
  if (button.dataset.head === undefined) row.forEach((b) => b.setAttribute("aria-pressed", on));
  const layer = buttons().find(
    (b) => b.dataset.layer === button.dataset.layer && b.dataset.head === undefined);
  if (row.length) layer.setAttribute("aria-pressed", row.every(pressed));
  tell();
});

// Arrow keys walk over the grid; only one of its buttons is in the tab order.
element.addEventListener("keydown", (event) => {
  const button = event.target.closest(".ac-grid button");
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  if (!button || !(event.key in moves)) return;
  event.preventDefault();
  const rows = [...element.querySelectorAll(".ac-grid tbody tr")];
  const row = rows.findIndex((each) => each.contains(button));
  const column = [...rows[row].querySelectorAll("button")].indexOf(button);
  const [down, right] = moves[event.key];
  const next = rows[row + down]?.querySelectorAll("button")[column + right];
  if (!next) return;
  button.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
