// What stands above a notebook while its session is stopped; settings can turn it off.
import type { INotebookTracker, NotebookPanel } from '@jupyterlab/notebook';
import type { TranslationBundle } from '@jupyterlab/translation';
import type { LabIcon } from '@jupyterlab/ui-components';
import type { CommandRegistry } from '@lumino/commands';
import { Widget } from '@lumino/widgets';
import type { Follower } from './follower';
import { stoppedSession, where } from './model';

const BUTTONS = [
  'djinn:continue',
  'djinn:next',
  'djinn:step_in',
  'djinn:step_out',
  'djinn:step_back'
];

export class Banner extends Widget {
  constructor(
    private readonly _djinn: Follower,
    private readonly _commands: CommandRegistry,
    private readonly _trans: TranslationBundle
  ) {
    super();
    this.addClass('jp-Djinn-banner');
    this.node.setAttribute('role', 'group');
    this.node.setAttribute('aria-label', _trans.__('stopped in Djinn'));
    this._text.className = 'jp-Djinn-bannerText';
    this.node.append(this._text);
    for (const id of BUTTONS) {
      this.node.append(this._button(id));
    }
    this.hide();
  }

  /** Show where the session stands, with what can be done there; or nothing. */
  show_(wanted: boolean): void {
    const session = wanted ? stoppedSession(this._djinn.view.snapshot) : null;
    this.setHidden(session === null);
    if (session) {
      this._text.textContent = where(session, this._trans);
      this._text.title = this._text.textContent;
    }
    for (const [id, button] of this._buttons) {
      button.disabled = !this._commands.isEnabled(id);
    }
  }

  private _button(id: string): HTMLButtonElement {
    const button = document.createElement('button');
    button.type = 'button';
    button.className = 'jp-Djinn-button';
    button.title = this._commands.caption(id);
    const icon = (this._commands.icon(id) as LabIcon).element({ tag: 'span' });
    icon.setAttribute('aria-hidden', 'true');
    const label = document.createElement('span');
    label.className = 'jp-Djinn-buttonLabel';
    label.textContent = this._commands.label(id);
    button.append(icon, label);
    button.addEventListener('click', () => {
      void this._commands.execute(id);
    });
    this._buttons.set(id, button);
    return button;
  }

  private readonly _text = document.createElement('span');
  private readonly _buttons = new Map<string, HTMLButtonElement>();
}

/** A banner for every notebook; only that of the one in front is shown. Returns a switch. */
export function addBanners(
  notebooks: INotebookTracker,
  djinn: Follower,
  commands: CommandRegistry,
  trans: TranslationBundle
): (wanted: boolean) => void {
  const banners = new Map<NotebookPanel, Banner>();
  let isWanted = true;
  const show = () => {
    for (const [panel, banner] of banners) {
      if (panel === djinn.panel) {
        banner.show_(isWanted);
      }
    }
  };
  const add = (panel: NotebookPanel) => {
    const banner = new Banner(djinn, commands, trans);
    banners.set(panel, banner);
    panel.contentHeader.addWidget(banner);
    panel.disposed.connect(() => banners.delete(panel));
  };
  notebooks.forEach(add);
  notebooks.widgetAdded.connect((_, panel) => add(panel));
  djinn.changed.connect(show);
  return wanted => {
    isWanted = wanted;
    show();
  };
}
