// Repairs what axe-core reports as serious in Gradio 6.17's own components.
function repair() {
  // Gradio measures a hidden copy of the tab bar, which the keyboard could reach.
  for (const copy of document.querySelectorAll(".tab-container[aria-hidden=true]")) copy.inert = true;
  for (const more of document.querySelectorAll(".overflow-menu > button:not([aria-label])"))
    more.setAttribute("aria-label", "More tabs");
  // Screen readers skip the name of an element without a role.
  for (const empty of document.querySelectorAll("div.empty[aria-label]:not([role])")) empty.setAttribute("role", "img");
  // Code that is wider than a phone has to scroll by keyboard too.
  for (const code of document.querySelectorAll(".cm-scroller[tabindex='-1']")) code.tabIndex = 0;
  // A message is a button inside a button; the outer one only collapses it.
  for (const header of document.querySelectorAll(".toast-header[role=button]")) {
    header.removeAttribute("role");
    header.removeAttribute("tabindex");
  }
}
new MutationObserver(repair).observe(document, { childList: true, subtree: true });
