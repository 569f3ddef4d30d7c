// The job's text. The page writes into the box here and nowhere else, and only while nobody has:
// that is asked and done in one go, so that no answer, however late, takes away what was typed.
// A textarea keeps what it was given beside what it holds: they differ once somebody wrote in it.
const box = element.querySelector("textarea");
const mine = () => box.value !== box.defaultValue;

function tell() {
  element.querySelector(".ac-mine").hidden = !mine();
}

function write(text) {
  const kept = mine();
  box.defaultValue = text;
  if (!kept) box.value = text;
  tell();
}

function follow() {
  box.value = box.defaultValue;
  tell();
}

async function copy(button) {
  box.select();
  // Browsers have no clipboard on pages that came over plain http from another machine.
  if (navigator.clipboard) await navigator.clipboard.writeText(box.value);
  else document.execCommand("copy");
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

box.addEventListener("input", tell);
box.addEventListener("taken", (event) => { if (box.value === event.detail) follow(); });
element.querySelector(".ac-follow").addEventListener("click", follow);
element.querySelector(".ac-copy").addEventListener("click", (event) => copy(event.target));
watch("value", () => write(props.value ?? ""));
write(props.value ?? "");
