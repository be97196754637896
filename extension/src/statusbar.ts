// The item of the status bar, and what a screen reader is told when a session comes to rest.
import type { TranslationBundle } from '@jupyterlab/translation';
import { Widget } from '@lumino/widgets';
import { announcement, statusText } from './model';
import type { Follower } from './follower';

/** One line; a click opens the sidebar. */
export class StatusItem extends Widget {
  constructor(djinn: Follower, trans: TranslationBundle, open: () => void) {
    const button = document.createElement('button');
    button.type = 'button';
    super({ node: button });
    this.addClass('jp-Djinn-statusItem');
    button.title = trans.__('Show the Djinn sidebar');
    button.addEventListener('click', open);
    const show = () => {
      const text = statusText(djinn.view.snapshot, trans);
      button.textContent = text;
      this.setHidden(text === '' || !this._isWanted);
    };
    djinn.changed.connect(show, this);
    this._show = show;
    show();
  }

  set isWanted(wanted: boolean) {
    this._isWanted = wanted;
    this._show();
  }

  private _isWanted = true;
  private readonly _show: () => void;
}

/** A live region of the page: there whether or not the sidebar is open. */
export function announce(djinn: Follower, trans: TranslationBundle): void {
  const region = document.createElement('div');
  region.className = 'jp-Djinn-live';
  region.setAttribute('role', 'status');
  region.setAttribute('aria-live', 'polite');
  region.setAttribute('aria-label', trans.__('Djinn'));
  document.body.append(region);
  djinn.changed.connect((_, view) => {
    const text = announcement(view.snapshot, trans);
    if (region.textContent !== text) {
      region.textContent = text;
    }
  });
}
