// Puts the parts together. Only the notebook is indispensable; the rest is used where it is there,
// so that Notebook 7 loads this too.
import type {
  JupyterFrontEnd,
  JupyterFrontEndPlugin
} from '@jupyterlab/application';
import { ILayoutRestorer } from '@jupyterlab/application';
import { ICommandPalette } from '@jupyterlab/apputils';
import { INotebookTracker } from '@jupyterlab/notebook';
import { ISettingRegistry } from '@jupyterlab/settingregistry';
import { IStatusBar } from '@jupyterlab/statusbar';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { addBanners } from './banner';
import { addCommands } from './commands';
import { Follower } from './follower';
import { isRunning, stoppedSession } from './model';
import { Sidebar } from './sidebar';
import { StatusItem, announce } from './statusbar';
import { IDjinn } from './tokens';

export { IDjinn } from './tokens';

const ID = 'djinn-nb:plugin';

const plugin: JupyterFrontEndPlugin<IDjinn> = {
  id: ID,
  description:
    'A debugger for transformers: the layer ladder, sessions, branches and memory of the notebook in front.',
  autoStart: true,
  provides: IDjinn,
  requires: [INotebookTracker],
  optional: [
    ICommandPalette,
    ILayoutRestorer,
    ISettingRegistry,
    IStatusBar,
    ITranslator
  ],
  activate: (
    app: JupyterFrontEnd,
    notebooks: INotebookTracker,
    palette: ICommandPalette | null,
    restorer: ILayoutRestorer | null,
    settings: ISettingRegistry | null,
    statusBar: IStatusBar | null,
    translator: ITranslator | null
  ): IDjinn => {
    const trans = (translator ?? nullTranslator).load('djinn');
    const djinn = new Follower(notebooks);

    const sidebar = new Sidebar(djinn, app.commands, trans);
    const open = () => app.shell.activateById(sidebar.id);
    // for who asked for it: what opens by itself leaves the cursor where it is
    const enter = () => {
      open();
      // the palette gives the focus back to where it was, once the command is carried out
      window.setTimeout(() => sidebar.node.focus(), 0);
    };
    const ids = addCommands(app.commands, djinn, trans, enter);
    app.shell.add(sidebar, 'left', { rank: 600, type: 'Debugger' });
    restorer?.add(sidebar, sidebar.id);

    const category = trans.__('Djinn');
    for (const command of ids) {
      palette?.addItem({ command, category });
    }

    announce(djinn, trans);
    const setBanner = addBanners(notebooks, djinn, app.commands, trans);
    const status = statusBar ? new StatusItem(djinn, trans, enter) : null;
    if (statusBar && status) {
      statusBar.registerStatusItem(`${ID}:status`, {
        item: status,
        align: 'left',
        rank: 90
      });
    }

    // shortcuts hold only where these say so; see the schema
    djinn.changed.connect((_, view) => {
      const data = document.body.dataset;
      data['djinnStopped'] = String(stoppedSession(view.snapshot) !== null);
      data['djinnRunning'] = String(isRunning(view.snapshot));
    });

    let opensItself = true;
    let greeted = '';
    djinn.changed.connect((_, view) => {
      const kernel = view.snapshot?.kernel ?? '';
      // once for a kernel, when djinn_nb is loaded in it
      if (opensItself && kernel !== '' && kernel !== greeted) {
        open();
      }
      greeted = kernel || greeted;
    });

    if (settings) {
      void settings
        .load(ID)
        .then(found => {
          const use = () => {
            setBanner(found.get('banner').composite === true);
            opensItself = found.get('openSidebar').composite === true;
            if (status) {
              status.isWanted = found.get('statusItem').composite === true;
            }
          };
          found.changed.connect(use);
          use();
        })
        // without its schema the defaults hold
        .catch(() => undefined);
    }
    return djinn;
  }
};

export default plugin;
